// A finished job with numbers, for the tests of the report.

#pragma once

#include <cmath>
#include <string>

#include "common/recipe.h"
#include "common/status.h"
#include "server/report/report.h"

namespace refinery::report {

inline v1::Task* AddTask(v1::Job* job, const std::string& path, v1::TaskKind kind, double seconds) {
  v1::Task* task = job->add_tasks();
  task->set_path(path);
  task->set_kind(kind);
  task->set_state(v1::Task::DONE);
  task->set_attempt(1);
  task->set_worker("w1");
  task->set_seconds(seconds);
  task->set_peak_memory_bytes(1'500'000'000);
  return task;
}

inline void Measure(v1::Task* task, const std::string& name, double value, double error, uint64_t count,
                    const std::string& unit) {
  v1::Measurement* measurement = task->add_measurements();
  measurement->set_name(name);
  measurement->set_value(value);
  measurement->set_standard_error(error);
  measurement->set_count(count);
  measurement->set_unit(unit);
}

inline v1::Task* AddVariant(v1::Job* job, const std::string& name, double kl, double accuracy, double bytes,
                            double latency) {
  v1::Task* task = AddTask(job, Join("evaluate/", name), v1::EVALUATE, 12.5);
  Measure(task, "held_out_kl", kl, 0.021, 24, "nats");
  Measure(task, "held_out_perplexity", std::exp(2 + kl), 0.31, 24, "");
  Measure(task, "held_out_answer_accuracy", 0.25 + accuracy / 4, 0.09, 24, "share");
  Measure(task, "arc_easy/acc", accuracy, 0.0347, 200, "share");
  Measure(task, "arc_easy/acc_norm", accuracy - 0.02, 0.0349, 200, "share");
  Measure(task, "model_bytes", bytes, 0, 1, "bytes");
  Measure(task, "ms_per_token", latency, 0, 32, "ms");
  return task;
}

inline v1::Trial* AddTrial(v1::Job* job, const std::string& optimizer, double rate, double mean, double error,
                           bool model = false) {
  v1::Trial* trial = job->add_trials();
  trial->set_index(static_cast<uint32_t>(job->trials_size()) - 1);
  trial->set_state(std::isfinite(mean) ? v1::Trial::SUCCEEDED : v1::Trial::INFEASIBLE);
  trial->set_origin(model ? "expected_improvement" : "sobol");
  trial->mutable_settings()->set_optimizer(optimizer);
  trial->mutable_settings()->set_learning_rate(rate);
  trial->mutable_settings()->set_temperature(1.5);
  trial->mutable_settings()->set_kl_weight(1);
  trial->mutable_settings()->set_lora_rank(16);
  for (uint32_t r = 0; r < 2; ++r) {
    v1::Replicate* replicate = trial->add_replicates();
    replicate->set_index(r);
    replicate->set_finished(true);
    replicate->set_infeasible(!std::isfinite(mean));
    AddTask(job, Join("trial/", trial->index(), "/replicate/", r), v1::TRAIN, 31);
  }
  if (std::isfinite(mean)) {
    trial->set_mean(mean);
    trial->set_standard_error(error);
  }
  return trial;
}

inline std::string Curve(double start, double end, bool with_validation) {
  std::string text;
  for (int step = 1; step <= 20; ++step) {
    const double loss = end + (start - end) * std::exp(-step / 6.0) + 0.03 * std::sin(step * 2.1);
    text += Join("{\"step\":", step, ",\"loss\":", loss, ",\"kl\":", loss, ",\"cross_entropy\":2.5,\"seconds\":1");
    text += with_validation && step % 5 == 0 ? Join(",\"validation_loss\":", loss + 0.05, "}\n") : "}\n";
  }
  return text;
}

inline ReportInput ExampleInput() {
  ReportInput input;
  v1::Job& job = input.job;
  job.set_id("demo-3f2a");
  job.set_state(v1::Job::RUNNING);
  v1::Recipe& recipe = *job.mutable_recipe();
  recipe.set_name("demo");
  recipe.mutable_student()->set_model("/models/SmolLM2-135M.gguf");
  recipe.mutable_teacher()->mutable_context()->set_few_shot(5);
  recipe.mutable_data()->set_task("arc_easy");
  recipe.mutable_data()->mutable_seeds()->set_benchmark("arc_easy");
  recipe.mutable_search()->set_trials(4);
  recipe.mutable_search()->set_replicates(2);
  recipe.mutable_evaluate()->add_benchmarks()->set_name("arc_easy");
  FillDefaults(&recipe);

  AddTask(&job, "import/student", v1::IMPORT_MODEL, 3.2);
  AddTask(&job, "synthesize/0", v1::SYNTHESIZE, 95);
  AddTask(&job, "curate", v1::CURATE, 0.6);
  AddTrial(&job, "muon", 2e-3, 0.412, 0.011);
  AddTrial(&job, "adamw", 1e-3, 0.455, 0.02);
  AddTrial(&job, "muon", 9e-3, NAN, 0);
  AddTrial(&job, "muon", 1.3e-3, 0.398, 0.009, true);
  AddVariant(&job, "student", 0.61, 0.52, 269e6, 14.2);
  AddVariant(&job, "student-gptq", 0.653, 0.505, 112.4e6, 9.1);
  AddVariant(&job, "refined", 0.402, 0.545, 269e6, 14.1);
  AddVariant(&job, "refined-gptq", 0.431, 0.53, 112.4e6, 9.0);
  AddVariant(&job, "best-adamw", 0.447, 0.535, 269e6, 14.3);
  AddVariant(&job, "best-muon", 0.402, 0.545, 269e6, 14.1)->set_state(v1::Task::CACHED);
  for (uint32_t t : {0, 1, 3})
    for (uint32_t r : {0, 1})
      input.curves[Join("trial/", t, "/replicate/", r)] = Curve(0.9 + 0.05 * r, 0.35 + 0.03 * t + 0.02 * r, true);
  input.curate_summary =
      R"({"raw": 128, "kept": 74, "train": 84, "validation": 11, "held_out": 11, "duplicate": 21, "no_answer": 33})";
  v1::Event note;
  note.mutable_task_note()->set_path("quantize/refined");
  note.mutable_task_note()->mutable_note()->set_code("damping_raised");
  note.mutable_task_note()->mutable_note()->set_text("model.layers.3.mlp.down_proj: damping raised from 0.01 to 0.02");
  input.notes = {note, note};
  return input;
}

}  // namespace refinery::report
