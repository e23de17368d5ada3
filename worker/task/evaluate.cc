#include "worker/task/runtime/torch.h"

#include "common/files.h"
#include "worker/task/data/benchmark.h"
#include "worker/task/distill/logit_cache.h"
#include "worker/task/eval/kl.h"
#include "worker/task/eval/multiple_choice.h"
#include "worker/task/eval/perplexity.h"
#include "worker/task/eval/scorer.h"
#include "worker/task/generate/latency.h"
#include "worker/task/models.h"
#include "worker/task/quantize/quantized_artifact.h"
#include "worker/task/tasks.h"

namespace refinery::task {
namespace {

constexpr int64_t kLatencyPrompt = 64;

// Measurements go out as events and stay in the output.
struct Recorder {
  TaskContext& context;
  nlohmann::json kept = nlohmann::json::array();

  // Timings are events only: the output of an evaluation must not depend on how busy the machine was.
  void Add(const Measurement& m) {
    context.events.Measure(m);
    if (m.unit == "ms") return;
    kept.push_back({{"name", m.name}, {"value", m.value}, {"standard_error", m.standard_error}, {"count", m.count}, {"unit", m.unit}});
  }
};

Status MeasureHeldOut(const model::CausalLm& lm, const tokenizer::Tokenizer& tokenizer, eval::Scorer& scorer, Recorder& recorder) {
  TaskContext& context = recorder.context;
  RF_ASSIGN_OR_RETURN(std::vector<data::Example> examples, data::ReadExamples(context.inputs / "examples" / "held_out.jsonl"));
  std::vector<data::EncodedExample> encoded;
  for (const data::Example& example : examples) {
    RF_ASSIGN_OR_RETURN(data::EncodedExample one, data::Encode(example, tokenizer, /*append_end=*/false));
    encoded.push_back(std::move(one));
  }
  RF_ASSIGN_OR_RETURN(std::shared_ptr<distill::LogitCache> teacher, distill::LogitCache::Open(context.inputs / "logits"));
  RF_ASSIGN_OR_RETURN(eval::KlResult kl, eval::KlToTeacher(lm, encoded, *teacher, context.events));
  RF_ASSIGN_OR_RETURN(eval::AnswerResult answers, eval::EvaluateAnswers(encoded, scorer));
  auto count = static_cast<uint64_t>(kl.examples);
  recorder.Add({.name = "held_out_kl", .value = kl.mean, .standard_error = kl.standard_error, .count = count, .unit = "nats"});
  recorder.Add({.name = "held_out_perplexity",
                .value = answers.perplexity,
                .standard_error = answers.perplexity * answers.loss_standard_error,
                .count = count});
  recorder.Add({.name = "held_out_answer_accuracy",
                .value = answers.exact_answers,
                .standard_error = answers.exact_standard_error,
                .count = count,
                .unit = "share"});
  recorder.Add({.name = "held_out_teacher_agreement", .value = kl.top1_agreement, .count = static_cast<uint64_t>(kl.tokens), .unit = "share"});
  return absl::OkStatus();
}

// Of this shard, where the evaluation has several.
StatusOr<eval::MultipleChoiceResult> ScoreBenchmark(const EvaluateSpec& spec, const BenchmarkSpec& benchmark, eval::Scorer& scorer,
                                                    TaskContext& context) {
  RF_ASSIGN_OR_RETURN(std::filesystem::path file, context.InputJsonl(Join("benchmark-", benchmark.name)));
  RF_ASSIGN_OR_RETURN(std::vector<data::MultipleChoiceItem> items,
                      data::ReadItems(benchmark.name, file, static_cast<size_t>(benchmark.limit)));
  return eval::EvaluateMultipleChoice(items, scorer.AsScoreFn(), {.shard = spec.shard, .shards = spec.shards});
}

// What the shards found, as if one task had scored all items.
StatusOr<eval::MultipleChoiceResult> MergeBenchmark(const EvaluateSpec& spec, const BenchmarkSpec& benchmark, TaskContext& context) {
  std::vector<eval::ItemResult> items;
  for (int64_t shard = 0; shard < spec.shards; ++shard) {
    RF_ASSIGN_OR_RETURN(std::filesystem::path folder, context.Input(Join("shard-", shard)));
    RF_RETURN_IF_ERROR(data::ForEachJsonLine(folder / Join("items-", benchmark.name, ".jsonl"), 0,
                                             [&](const nlohmann::json& row, const std::string& where) -> Status {
                                               RF_ASSIGN_OR_RETURN(eval::ItemResult item, eval::ItemResultFromJson(row, where));
                                               items.push_back(std::move(item));
                                               return absl::OkStatus();
                                             }));
  }
  RF_ASSIGN_OR_RETURN(eval::MultipleChoiceResult result,
                      eval::Summarize(benchmark.name, std::move(items), data::HasAccNorm(benchmark.name)));
  for (size_t i = 0; i < result.items.size(); ++i) {
    if (result.items[i].row != static_cast<int64_t>(i)) return DataLoss("the shards lack row ", i, " of ", benchmark.name);
  }
  return result;
}

Status WriteItems(const BenchmarkSpec& benchmark, const eval::MultipleChoiceResult& result, const TaskContext& context) {
  std::string lines;
  for (const eval::ItemResult& item : result.items) lines += eval::ToJson(item).dump() + "\n";
  return WriteFileAtomically(context.outputs / Join("items-", benchmark.name, ".jsonl"), lines);
}

Status RecordBenchmark(const BenchmarkSpec& benchmark, const eval::MultipleChoiceResult& result, Recorder& recorder) {
  auto count = static_cast<uint64_t>(result.count);
  auto add = [&](const char* metric, const eval::Accuracy& accuracy) {
    recorder.Add({.name = Join(benchmark.name, "/", metric),
                  .value = accuracy.value,
                  .standard_error = accuracy.standard_error,
                  .count = count,
                  .unit = "share"});
  };
  add("acc", result.acc);
  if (result.acc_norm.has_value()) add("acc_norm", *result.acc_norm);
  return WriteItems(benchmark, result, recorder.context);
}

Status RunShard(const EvaluateSpec& spec, eval::Scorer& scorer, TaskContext& context) {
  for (const BenchmarkSpec& benchmark : spec.benchmarks) {
    RF_ASSIGN_OR_RETURN(const eval::MultipleChoiceResult result, ScoreBenchmark(spec, benchmark, scorer, context));
    RF_RETURN_IF_ERROR(WriteItems(benchmark, result, context));
  }
  return absl::OkStatus();
}

// Bytes of the weights as they are stored: everything else in the compute type, the linear layers of the blocks in it too or as
// codes and scales.
Status MeasureSize(model::CausalLm& lm, Recorder& recorder) {
  TaskContext& context = recorder.context;
  size_t linear = 0;
  for (model::DecoderLayer& layer : lm.layers)
    for (model::Linear* l : layer.Linears()) linear += l->weight.nbytes();
  size_t total = lm.embed_tokens.nbytes() + lm.final_norm.nbytes();
  if (!lm.lm_head.is_same(lm.embed_tokens)) total += lm.lm_head.nbytes();
  for (const model::DecoderLayer& layer : lm.layers) total += layer.input_norm.nbytes() + layer.post_attention_norm.nbytes();
  if (context.HasInput("quantized")) {
    RF_ASSIGN_OR_RETURN(quantize::QuantizedModel quantized, quantize::LoadQuantized(context.inputs / "quantized"));
    linear = static_cast<size_t>(quantize::QuantizedBytes(quantized));
  }
  recorder.Add({.name = "model_bytes", .value = static_cast<double>(total + linear), .count = 1, .unit = "bytes"});
  recorder.Add({.name = "linear_bytes", .value = static_cast<double>(linear), .count = 1, .unit = "bytes"});
  return absl::OkStatus();
}

}  // namespace

Status Evaluate(const EvaluateSpec& spec, TaskContext& context) {
  c10::InferenceMode inference;
  RF_ASSIGN_OR_RETURN(ResolvedModel student, ResolveInput(context, "student"));
  RF_ASSIGN_OR_RETURN(auto tokenizer, tokenizer::Tokenizer::Load(student.folder->path()));
  RF_ASSIGN_OR_RETURN(std::shared_ptr<model::CausalLm> lm, LoadVariant(context, student));
  eval::Scorer scorer(lm, tokenizer, context.events);
  if (spec.shards > 1 && !spec.merge) return RunShard(spec, scorer, context);
  Recorder recorder{.context = context};
  RF_RETURN_IF_ERROR(MeasureHeldOut(*lm, *tokenizer, scorer, recorder));
  for (const BenchmarkSpec& benchmark : spec.benchmarks) {
    auto result = spec.merge ? MergeBenchmark(spec, benchmark, context) : ScoreBenchmark(spec, benchmark, scorer, context);
    RF_RETURN_IF_ERROR(result.status());
    RF_RETURN_IF_ERROR(RecordBenchmark(benchmark, *result, recorder));
  }
  RF_RETURN_IF_ERROR(MeasureSize(*lm, recorder));
  if (spec.latency_tokens > 0 && context.HasInput("quantized") && lm->device().is_cpu() && lm->dtype() == at::kBFloat16) {
    RF_ASSIGN_OR_RETURN(const quantize::QuantizedModel quantized, quantize::LoadQuantized(context.inputs / "quantized"));
    quantize::PackQuantized(*lm, quantized);
  }
  if (spec.latency_tokens > 0)
    recorder.Add({.name = "ms_per_token",
                  .value = generate::MillisecondsPerToken(*lm, kLatencyPrompt, spec.latency_tokens),
                  .count = static_cast<uint64_t>(spec.latency_tokens),
                  .unit = "ms"});
  return WriteFileAtomically(context.outputs / "measurements.json", recorder.kept.dump(2) + "\n");
}

}  // namespace refinery::task
