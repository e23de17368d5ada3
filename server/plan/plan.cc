#include "server/plan/plan.h"

#include <algorithm>
#include <set>

#include "absl/strings/str_format.h"
#include "common/digest.h"
#include "common/limits.h"

namespace refinery::plan {
namespace {

using Source = Input::Source;

constexpr uint64_t kMaxVariants = 7;  // student, refined, both quantized, recovered, and the best of each optimizer

class Planner {
 public:
  Planner(const v1::Recipe& recipe, const std::map<std::string, std::string>& files) : recipe_(recipe), files_(files) {}

  StatusOr<Plan> Make() {
    RF_RETURN_IF_ERROR(CheckFiles());
    RF_RETURN_IF_ERROR(CheckSize());
    AddImports();
    AddData();
    AddTeacherLogits();
    AddTrials();
    AddMergeAndQuantize();
    AddEvaluations();
    AddExport();
    return std::move(plan_);
  }

 private:
  Status CheckFiles() const {
    std::vector<std::string> roles = {"seeds"};
    if (Mixes()) roles.push_back("general");
    for (const v1::Benchmark& benchmark : recipe_.evaluate().benchmarks())
      roles.push_back(Join("benchmark/", benchmark.name()));
    for (const std::string& role : roles) {
      auto it = files_.find(role);
      if (it == files_.end() || it->second.empty())
        return FailedPrecondition("the recipe needs the file '", role, "', which was not uploaded with the job");
    }
    return absl::OkStatus();
  }

  // Before anything is built: shards and trials are the only parts that a recipe can blow up.
  Status CheckSize() const {
    const uint64_t trials =
        uint64_t{std::max(1u, recipe_.search().trials())} * std::max(1u, recipe_.search().replicates());
    const uint64_t tasks = 2 * uint64_t{recipe_.data().synthesize().shards()} + trials +
                           kMaxVariants * (Shards() - 1) + 16;
    if (tasks <= limits::kMaxTasksPerJob) return absl::OkStatus();
    return FailedPrecondition("the plan would have ", tasks, " tasks; a job may have ", limits::kMaxTasksPerJob,
                              "; lower data.synthesize.shards, evaluate.shards, search.trials or search.replicates");
  }

  // Adds a task; `needs` follows from the inputs: the tasks named there and, for the study's best, every trial.
  v1::TaskSpec* Add(const std::string& path, v1::TaskKind kind, std::vector<Input> inputs, std::string summary) {
    PlannedTask task{.path = path, .kind = kind, .inputs = std::move(inputs)};
    task.summary = std::move(summary);
    task.spec.set_path(path);
    task.spec.set_threads(recipe_.resources().threads());
    if (IsSeeded(kind)) task.spec.set_seed(DeriveSeed(recipe_.seed(), path));
    std::set<std::string> seen;
    auto need = [&](const std::string& other) {
      if (seen.insert(other).second) task.needs.push_back(other);
    };
    for (const Input& input : task.inputs) {
      if (input.source == Source::kTask) need(input.from);
      if (input.source == Source::kStudyBest)
        for (const std::string& trial : trials_) need(trial);
    }
    plan_.tasks.push_back(std::move(task));
    return &plan_.tasks.back().spec;
  }

  static Input FromTask(std::string name, std::string path) {
    return {std::move(name), Source::kTask, std::move(path)};
  }
  static Input FromFile(std::string name, std::string role) {
    return {std::move(name), Source::kFile, std::move(role)};
  }
  static Input FromStudy(std::string selector) { return {"adapter", Source::kStudyBest, std::move(selector)}; }
  Input Student() const { return FromTask("student", "import/student"); }
  Input Teacher() const { return FromTask("teacher", teacher_); }
  Input Examples() const { return FromTask("examples", "curate"); }
  Input Logits() const { return FromTask("logits", "teacher-logits"); }
  void AppendBenchmarks(std::vector<Input>* inputs) const {
    for (const v1::Benchmark& benchmark : recipe_.evaluate().benchmarks())
      inputs->push_back(FromFile(Join("benchmark-", benchmark.name()), Join("benchmark/", benchmark.name())));
  }

  void AddImports() {
    v1::ImportModelParams* student =
        Add("import/student", v1::IMPORT_MODEL, {}, Join("read ", recipe_.student().model()))->mutable_import_model();
    student->set_uri(recipe_.student().model());
    *student->mutable_gptq() = Gptq();
    *student->mutable_formats() = recipe_.export_().formats();
    if (recipe_.teacher().model() == recipe_.student().model()) return;
    teacher_ = "import/teacher";
    Add(teacher_, v1::IMPORT_MODEL, {Student()}, Join("read ", recipe_.teacher().model()))
        ->mutable_import_model()
        ->set_uri(recipe_.teacher().model());
  }

  void AddData() {
    const v1::Data& data = recipe_.data();
    const uint32_t shards = data.synthesize().shards();
    std::vector<Input> scored;
    for (uint32_t shard = 0; shard < shards; ++shard) {
      v1::SynthesizeParams* params =
          Add(Join("synthesize/", shard), v1::SYNTHESIZE, {Teacher(), FromFile("seeds", "seeds")},
              Join("the teacher writes ", Share(data.synthesize().examples(), shard, shards), " examples"))
              ->mutable_synthesize();
      params->set_task(data.task());
      params->set_description(data.description());
      *params->mutable_settings() = data.synthesize();
      params->set_shard(shard);
      params->set_shards(shards);
      params->set_seed_limit(data.seeds().limit());
    }
    for (uint32_t shard = 0; shard < shards; ++shard) {
      const std::string path = Join("critique/", shard);
      v1::CritiqueParams* judge =
          Add(path, v1::CRITIQUE, {Teacher(), FromTask("raw", Join("synthesize/", shard)), FromFile("seeds", "seeds")},
              Join("the judge keeps the best ", absl::StrFormat("%g", 100 * data.critique().keep_fraction()), " %"))
              ->mutable_critique();
      judge->set_task(data.task());
      judge->set_keep_fraction(data.critique().keep_fraction());
      judge->set_seed_limit(data.seeds().limit());
      scored.push_back(FromTask(Join("scored-", shard), path));
    }
    scored.push_back(FromFile("seeds", "seeds"));
    AppendBenchmarks(&scored);
    v1::CurateParams* params =
        Add("curate", v1::CURATE, std::move(scored), "drop duplicates and benchmark items, split")->mutable_curate();
    params->set_task(data.task());
    *params->mutable_settings() = data.curate();
    params->set_seed_limit(data.seeds().limit());
  }

  // Examples of one shard: the first ones take the rest.
  static uint32_t Share(uint32_t examples, uint32_t shard, uint32_t shards) {
    return examples / shards + (shard < examples % shards ? 1 : 0);
  }

  void AddTeacherLogits() {
    const uint32_t shots = recipe_.teacher().context().few_shot();
    v1::TeacherLogitsParams* params =
        Add("teacher-logits", v1::TEACHER_LOGITS, {Teacher(), Student(), Examples(), FromFile("seeds", "seeds")},
            Join("top ", recipe_.distill().top_k(), " of the teacher per token",
                 shots == 0 ? "" : Join(", which sees ", shots, " solved examples")))
            ->mutable_teacher_logits();
    params->set_task(recipe_.data().task());
    *params->mutable_context() = recipe_.teacher().context();
    params->set_top_k(recipe_.distill().top_k());
    params->set_seed_limit(recipe_.data().seeds().limit());
  }

  void AddTrials() {
    const v1::Distill& distill = recipe_.distill();
    const uint32_t trials = std::max<uint32_t>(1, recipe_.search().trials());
    const uint32_t replicates = std::max<uint32_t>(1, recipe_.search().replicates());
    for (uint32_t trial = 0; trial < trials; ++trial) {
      for (uint32_t replicate = 0; replicate < replicates; ++replicate) {
        const std::string path = Join("trial/", trial, "/replicate/", replicate);
        v1::TrainParams* params =
            Add(path, v1::TRAIN, {Student(), Examples(), Logits()},
                Join("train a rank-", distill.lora().rank(), " adapter for ", distill.steps(), " steps"))
                ->mutable_train();
        params->set_steps(distill.steps());
        params->set_tokens_per_step(distill.tokens_per_step());
        params->set_checkpoint_every(distill.checkpoint_every());
        plan_.tasks.back().trial = static_cast<int>(trial);
        plan_.tasks.back().replicate = static_cast<int>(replicate);
        trials_.push_back(path);
      }
    }
  }

  void AddMergeAndQuantize() {
    const v1::Gptq gptq = Gptq();
    std::vector<Input> inputs = {Student(), Examples()}, refined = {Student(), FromStudy("best"), Examples()};
    if (Mixes()) {
      inputs.push_back(FromFile("general", "general"));
      refined.push_back(FromFile("general", "general"));
    }
    const std::string width = gptq.bits_budget() > 0    ? absl::StrFormat("%g bits a weight on average", gptq.bits_budget())
                              : gptq.bytes_budget() > 0 ? Join("at most ", gptq.bytes_budget(), " bytes of linear layers")
                                                        : Join(gptq.bits(), " bit");
    const std::string how = Join("GPTQ ", width, ", ",
                                 gptq.group_size() < 0 ? "one group per row" : Join("groups of ", gptq.group_size()));
    Add("merge/best", v1::MERGE, {Student(), FromStudy("best")}, "fold the best adapter into the student")
        ->mutable_merge()
        ->set_keep_model(recipe_.export_().merged_model());
    // Gates are the delivered model's: what is only compared with it, or recovered afterwards, stops no job.
    v1::Gptq ungated = gptq;
    ungated.clear_max_kl();
    ungated.clear_max_ppl_ratio();
    SetQuantize(ungated, Add("quantize/student", v1::QUANTIZE, std::move(inputs), Join(how, " of the untouched student")));
    SetQuantize(Recovers() ? ungated : gptq,
                Add("quantize/refined", v1::QUANTIZE, std::move(refined), Join(how, " of the refined model")));
    if (!Recovers()) return;
    const v1::Recover& recover = recipe_.quantize().recover();
    v1::RecoverParams* params = Add("recover/refined", v1::RECOVER,
                                    {Student(), FromStudy("best"), FromTask("quantized", "quantize/refined"), Examples()},
                                    Join("tune its scales for up to ", recover.steps(), " steps"))
                                    ->mutable_recover();
    *params->mutable_settings() = recover;
    v1::QualityGate* gate = params->mutable_gate();
    gate->set_max_kl(gptq.max_kl());
    gate->set_max_ppl_ratio(gptq.max_ppl_ratio());
    gate->set_held_out_tokens(gptq.held_out_tokens());
    gate->set_sequence_length(gptq.sequence_length());
  }

  // Without a budget the formats change no codes: other formats find the same result.
  void SetQuantize(const v1::Gptq& gptq, v1::TaskSpec* spec) const {
    *spec->mutable_quantize()->mutable_gptq() = gptq;
    if (gptq.bits_budget() > 0 || gptq.bytes_budget() > 0) *spec->mutable_quantize()->mutable_formats() = recipe_.export_().formats();
  }

  bool Recovers() const { return recipe_.quantize().recover().enabled(); }
  // The refined model's quantized weights as they are delivered.
  Input Delivered() const { return FromTask("quantized", Recovers() ? "recover/refined" : "quantize/refined"); }

  // As tasks see it: the general text comes as an input.
  v1::Gptq Gptq() const {
    v1::Gptq gptq = recipe_.quantize().gptq();
    gptq.mutable_calibration()->clear_general();
    return gptq;
  }

  // Whether the calibration has general text beside the job's own.
  bool Mixes() const { return !recipe_.quantize().gptq().calibration().general().empty(); }

  uint64_t Shards() const { return std::max<uint64_t>(1, recipe_.evaluate().shards()); }

  std::string BenchmarkNames() const {
    std::string names;
    for (const v1::Benchmark& benchmark : recipe_.evaluate().benchmarks())
      names += (names.empty() ? "" : ", ") + benchmark.name();
    return names;
  }

  v1::EvaluateParams* AddEvaluate(const std::string& path, const std::string& variant, std::vector<Input> inputs,
                                  std::string summary) {
    v1::EvaluateParams* params =
        Add(path, v1::EVALUATE, std::move(inputs), std::move(summary))->mutable_evaluate();
    params->set_variant(variant);
    for (const v1::Benchmark& benchmark : recipe_.evaluate().benchmarks()) {
      v1::Benchmark* copy = params->add_benchmarks();
      *copy = benchmark;
      copy->clear_file();  // its rows come as an input
    }
    return params;
  }

  // The tasks that share the items of the benchmarks, and their outputs as inputs of the task that merges them.
  std::vector<Input> AddShards(const std::string& variant, const std::vector<Input>& model) {
    std::vector<Input> outputs;
    for (uint64_t shard = 0; shard < Shards(); ++shard) {
      std::vector<Input> inputs = {Student()};
      inputs.insert(inputs.end(), model.begin(), model.end());
      AppendBenchmarks(&inputs);
      const std::string path = Join("evaluate/", variant, "/shard/", shard);
      v1::EvaluateParams* params =
          AddEvaluate(path, variant, std::move(inputs), Join("score part ", shard + 1, " of ", Shards(), " of ", BenchmarkNames()));
      params->set_shard(static_cast<uint32_t>(shard));
      params->set_shards(static_cast<uint32_t>(Shards()));
      outputs.push_back(FromTask(Join("shard-", shard), path));
    }
    return outputs;
  }

  void AddEvaluation(const std::string& variant, std::vector<Input> model) {
    const bool sharded = Shards() > 1;
    std::vector<Input> inputs = {Student()};
    inputs.insert(inputs.end(), model.begin(), model.end());
    inputs.push_back(Examples());
    inputs.push_back(Logits());
    if (sharded) {
      std::vector<Input> shards = AddShards(variant, model);
      inputs.insert(inputs.end(), shards.begin(), shards.end());
    } else {
      AppendBenchmarks(&inputs);
    }
    std::string what = "held-out KL, speed";
    if (!BenchmarkNames().empty()) what += ", " + BenchmarkNames();
    v1::EvaluateParams* params = AddEvaluate(Join("evaluate/", variant), variant, std::move(inputs), "measure " + what);
    params->set_latency_tokens(recipe_.evaluate().latency_tokens());
    if (!sharded) return;
    params->set_shards(static_cast<uint32_t>(Shards()));
    params->set_merge(true);
  }

  void AddEvaluations() {
    AddEvaluation("student", {});
    AddEvaluation("student-gptq", {FromTask("quantized", "quantize/student")});
    AddEvaluation("refined", {FromStudy("best")});
    // The quantized linears hold the adapter already.
    AddEvaluation("refined-gptq", {FromTask("quantized", "quantize/refined")});
    if (Recovers()) AddEvaluation("refined-recovered", {Delivered()});
    for (const std::string& optimizer : TriedOptimizers()) {
      const std::string name = Join("best-", optimizer);
      AddEvaluation(name, {FromStudy(name)});
    }
  }

  // Sorted.
  std::set<std::string> TriedOptimizers() const {
    for (const v1::Parameter& parameter : recipe_.search().parameters())
      if (parameter.name() == "optimizer") return {parameter.choices().begin(), parameter.choices().end()};
    return {recipe_.distill().optimizer().has_adamw() ? "adamw" : "muon"};
  }

  void AddExport() {
    v1::ExportParams* params =
        Add("export", v1::EXPORT,
            {Student(), FromStudy("best"), Delivered(), FromTask("merged", "merge/best")},
            "write the model folders and the manifest")
            ->mutable_export_();
    params->set_name(recipe_.name());
    params->set_merged_model(recipe_.export_().merged_model());
    *params->mutable_formats() = recipe_.export_().formats();
    *params->mutable_gguf() = recipe_.export_().gguf();
  }

  const v1::Recipe& recipe_;
  const std::map<std::string, std::string>& files_;
  std::string teacher_ = "import/student";
  std::vector<std::string> trials_;
  Plan plan_;
};

// "trial/*/replicate/* (8)" for the trials, which would fill the line; other names as they are.
std::string NeedsText(const std::vector<std::string>& needs) {
  std::string text;
  size_t trials = 0;
  for (const std::string& need : needs) {
    if (need.rfind("trial/", 0) == 0) {
      ++trials;
    } else {
      text += (text.empty() ? "" : ", ") + need;
    }
  }
  if (trials > 0) text += Join(text.empty() ? "" : ", ", "every trial (", trials, ")");
  return text;
}

void Pad(std::string* text, size_t width) { text->resize(std::max(text->size(), width), ' '); }

}  // namespace

const PlannedTask* Plan::Find(const std::string& path) const {
  for (const PlannedTask& task : tasks)
    if (task.path == path) return &task;
  return nullptr;
}

StatusOr<Plan> MakePlan(const v1::Recipe& recipe, const std::map<std::string, std::string>& files) {
  return Planner(recipe, files).Make();
}

std::string PlanText(const Plan& plan) {
  size_t path_width = 4;
  size_t summary_width = 4;
  for (const PlannedTask& task : plan.tasks) {
    path_width = std::max(path_width, task.path.size());
    summary_width = std::max(summary_width, task.summary.size());
  }
  std::string text = "task";
  Pad(&text, path_width + 2);
  text += "what";
  Pad(&text, path_width + summary_width + 4);
  text += "after\n";
  for (const PlannedTask& task : plan.tasks) {
    std::string line = task.path;
    Pad(&line, path_width + 2);
    line += task.summary;
    const std::string needs = NeedsText(task.needs);
    if (!needs.empty()) {
      Pad(&line, path_width + summary_width + 4);
      line += needs;
    }
    text += line + "\n";
  }
  return text + Join(plan.tasks.size(), " tasks\n");
}

}  // namespace refinery::plan
