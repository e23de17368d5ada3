#include <google/protobuf/util/json_util.h>

#include "refinery/v1/task.pb.h"
#include "worker/task/spec.h"

namespace refinery::task {
namespace {

// A job of before the field had all of them.
std::vector<int64_t> Widths(const v1::Gptq& p) {
  if (p.widths().empty()) return {2, 3, 4, 8};
  return {p.widths().begin(), p.widths().end()};
}

GptqSpec ToSpec(const v1::Gptq& p) {
  const bool budget = p.bits_budget() > 0 || p.bytes_budget() > 0;
  return {.bits = budget ? Widths(p).front() : p.bits(),
          .group_size = p.group_size(),
          .damp_fraction = p.damp_fraction(),
          .calibration_tokens = p.calibration_tokens(),
          .sequence_length = p.sequence_length(),
          .grid = p.grid(),
          .order = p.order(),
          .alpha = p.alpha(),
          .bits_budget = p.bits_budget(),
          .bytes_budget = static_cast<int64_t>(p.bytes_budget()),
          .widths = Widths(p),
          .gate = {.max_kl = p.max_kl(),
                   .max_ppl_ratio = p.max_ppl_ratio(),
                   .held_out_tokens = p.held_out_tokens(),
                   .sequence_length = p.sequence_length()},
          .memory_mib = p.memory_mib(),
          .general_share = p.calibration().general_share(),
          .duplicate_threshold = p.calibration().duplicate_threshold(),
          .calibration_seed = p.calibration().seed()};
}

SynthesizeSpec ToSpec(const v1::SynthesizeParams& p) {
  const v1::Synthesize& s = p.settings();
  return {.task = p.task(),
          .description = p.description(),
          .examples = s.examples(),
          .topics = s.topics(),
          .few_shot = s.few_shot(),
          .temperature = s.temperature(),
          .top_p = s.top_p(),
          .max_new_tokens = s.max_new_tokens(),
          .shard = p.shard(),
          .shards = p.shards() == 0 ? 1 : p.shards(),
          .seed_limit = p.seed_limit(),
          .structured = s.structured()};
}

CurateSpec ToSpec(const v1::CurateParams& p) {
  const v1::Curate& s = p.settings();
  return {.task = p.task(),
          .validation_fraction = s.validation_fraction(),
          .held_out_fraction = s.held_out_fraction(),
          .duplicate_threshold = s.duplicate_threshold(),
          .seed_examples = s.seed_examples(),
          .seed_limit = p.seed_limit()};
}

TrainSpec ToSpec(const v1::TrainParams& p) {
  const v1::TrialSettings& s = p.settings();
  return {.optimizer = s.optimizer(),
          .learning_rate = s.learning_rate(),
          .temperature = s.temperature(),
          .kl_weight = s.kl_weight(),
          .lora_rank = s.lora_rank(),
          .lora_alpha = s.lora_alpha(),
          .weight_decay = s.weight_decay(),
          .momentum = s.momentum(),
          .beta1 = s.beta1(),
          .beta2 = s.beta2(),
          .steps = p.steps(),
          .tokens_per_step = p.tokens_per_step(),
          .checkpoint_every = p.checkpoint_every()};
}

RecoverSpec ToSpec(const v1::RecoverParams& p) {
  const v1::Recover& s = p.settings();
  const v1::QualityGate& gate = p.gate();
  return {.gate = {.max_kl = gate.max_kl(),
                   .max_ppl_ratio = gate.max_ppl_ratio(),
                   .held_out_tokens = gate.held_out_tokens(),
                   .sequence_length = gate.sequence_length()},
          .steps = s.steps(),
          .tokens_per_step = s.tokens_per_step(),
          .learning_rate = s.learning_rate(),
          .layer_weight = s.layer_weight(),
          .sequence_length = s.sequence_length(),
          .patience = s.patience(),
          .evaluate_every = s.evaluate_every(),
          .checkpoint_every = s.checkpoint_every()};
}

EvaluateSpec ToSpec(const v1::EvaluateParams& p) {
  EvaluateSpec spec{.variant = p.variant(),
                    .latency_tokens = p.latency_tokens(),
                    .shard = p.shard(),
                    .shards = p.shards() == 0 ? 1 : p.shards(),
                    .merge = p.merge()};
  for (const v1::Benchmark& b : p.benchmarks()) spec.benchmarks.push_back({.name = b.name(), .limit = b.limit()});
  return spec;
}

ExportSpec ToSpec(const v1::ExportParams& p) {
  return {.name = p.name(),
          .merged_model = p.merged_model(),
          .formats = {p.formats().begin(), p.formats().end()},
          .gguf_embeddings_q8_0 = p.gguf().embeddings() == "q8_0",
          .gguf_head_q8_0 = p.gguf().head() == "q8_0"};
}

StatusOr<Params> ToParams(const v1::TaskSpec& p, const std::string& name) {
  switch (p.params_case()) {
    case v1::TaskSpec::kImportModel:
      return ImportModelSpec{.uri = p.import_model().uri(),
                             .gptq = ToSpec(p.import_model().gptq()),
                             .formats = {p.import_model().formats().begin(), p.import_model().formats().end()}};
    case v1::TaskSpec::kSynthesize:
      return ToSpec(p.synthesize());
    case v1::TaskSpec::kCritique:
      return CritiqueSpec{.task = p.critique().task(),
                          .keep_fraction = p.critique().keep_fraction(),
                          .seed_limit = p.critique().seed_limit()};
    case v1::TaskSpec::kCurate:
      return ToSpec(p.curate());
    case v1::TaskSpec::kTeacherLogits:
      return TeacherLogitsSpec{.task = p.teacher_logits().task(),
                               .system_prompt = p.teacher_logits().context().system_prompt(),
                               .few_shot = p.teacher_logits().context().few_shot(),
                               .top_k = p.teacher_logits().top_k(),
                               .seed_limit = p.teacher_logits().seed_limit()};
    case v1::TaskSpec::kTrain:
      return ToSpec(p.train());
    case v1::TaskSpec::kMerge:
      return MergeSpec{.keep_model = p.merge().keep_model()};
    case v1::TaskSpec::kQuantize:
      return QuantizeSpec{.gptq = ToSpec(p.quantize().gptq()), .formats = {p.quantize().formats().begin(), p.quantize().formats().end()}};
    case v1::TaskSpec::kRecover:
      return ToSpec(p.recover());
    case v1::TaskSpec::kEvaluate:
      return ToSpec(p.evaluate());
    case v1::TaskSpec::kExport:
      return ToSpec(p.export_());
    case v1::TaskSpec::PARAMS_NOT_SET:
      break;
  }
  return InvalidArgument(name, " names no task kind: one of import_model, synthesize, critique, curate, teacher_logits, train, "
                         "merge, quantize, recover, evaluate, export is needed");
}

}  // namespace

StatusOr<TaskSpec> TaskSpecFromJson(const std::string& json, const std::string& name) {
  v1::TaskSpec p;
  auto status = google::protobuf::util::JsonStringToMessage(json, &p);
  if (!status.ok()) return InvalidArgument(name, " is not a task specification: ", std::string(status.message()));
  RF_ASSIGN_OR_RETURN(Params params, ToParams(p, name));
  return TaskSpec{.job = p.job(), .path = p.path(), .seed = p.seed(), .threads = static_cast<int>(p.threads()), .params = std::move(params)};
}

}  // namespace refinery::task
