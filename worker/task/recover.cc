#include "worker/task/recover/recover.h"

#include "worker/task/runtime/torch.h"

#include <algorithm>

#include "worker/task/calibration.h"
#include "worker/task/models.h"
#include "worker/task/quality_gate.h"
#include "worker/task/quantize/quantized_artifact.h"
#include "worker/task/tasks.h"

namespace refinery::task {
namespace {

constexpr int64_t kHeldOutTokens = 4096;

// The job's own curated examples of one split, packed into sequences of about `tokens` tokens together.
StatusOr<std::vector<std::vector<int32_t>>> Sequences(const TaskContext& context, const char* split,
                                                      const tokenizer::Tokenizer& tokenizer, int64_t tokens, int64_t length) {
  RF_ASSIGN_OR_RETURN(const std::vector<data::Example> examples, data::ReadExamples(context.inputs / "examples" / split));
  RF_ASSIGN_OR_RETURN(Calibration packed, MakeCalibration(examples, tokenizer, tokens, length));
  return std::move(packed.sequences);
}

void Report(const recover::RecoverResult& result, TaskContext& context) {
  const auto count = static_cast<uint64_t>(kHeldOutTokens);
  context.events.Measure({.name = "kl_before_recovery", .value = result.kl_before, .count = count, .unit = "nats"});
  context.events.Measure({.name = "kl_after_recovery", .value = result.kl_after, .count = count, .unit = "nats"});
  context.events.Measure({.name = "recovery_steps", .value = static_cast<double>(result.steps), .count = 1});
  if (result.stopped_early)
    context.events.Note("recover_stopped_early", Join("the held-out KL did not get better after step ", result.best_step,
                                                      "; ended after step ", result.steps));
}

// What is delivered, beside its source, on the same held-out text as quantization was measured on.
Status Gate(const GateSpec& gate, const model::CausalLm& source, const ResolvedModel& student, const quantize::QuantizedModel& recovered,
            const quantize::TokenSequences& held_out, TaskContext& context) {
  if (held_out.ids.empty()) return absl::OkStatus();
  RF_ASSIGN_OR_RETURN(const std::shared_ptr<model::CausalLm> delivered, LoadMerged(context, student));
  RF_RETURN_IF_ERROR(quantize::ApplyQuantized(*delivered, recovered));
  const quantize::Fidelity figures = quantize::MeasureFidelity(source, *delivered, held_out);
  const auto count = static_cast<uint64_t>(figures.tokens);
  context.events.Measure({.name = "source_perplexity", .value = figures.source_perplexity, .count = count});
  context.events.Measure({.name = "recovered_perplexity", .value = figures.perplexity, .count = count});
  context.events.Measure({.name = "recovered_kl", .value = figures.kl, .count = count, .unit = "nats"});
  return CheckGate(gate, figures, "recovered");
}

}  // namespace

Status Recover(const RecoverSpec& spec, TaskContext& context) {
  RF_ASSIGN_OR_RETURN(ResolvedModel student, ResolveInput(context, "student"));
  RF_ASSIGN_OR_RETURN(auto tokenizer, tokenizer::Tokenizer::Load(student.folder->path()));
  RF_ASSIGN_OR_RETURN(const quantize::TokenSequences held_out, HeldOutText(spec.gate, *tokenizer, context));
  RF_ASSIGN_OR_RETURN(std::filesystem::path folder, context.Input("quantized"));
  RF_ASSIGN_OR_RETURN(quantize::QuantizedModel quantized, quantize::LoadQuantized(folder));
  RF_ASSIGN_OR_RETURN(std::shared_ptr<model::CausalLm> source, LoadMerged(context, student));

  const int64_t longest = source->config().max_position;
  const int64_t length = longest > 0 ? std::min(spec.sequence_length, longest) : spec.sequence_length;
  if (length < spec.sequence_length) {
    context.events.Note("recover_sequence_length", Join("recovery packs sequences of ", length, " tokens, all that the model takes, not of ",
                                                        spec.sequence_length));
  }
  recover::RecoverInputs inputs{.source = source.get(), .seed = context.seed};
  RF_ASSIGN_OR_RETURN(inputs.train, Sequences(context, "train.jsonl", *tokenizer, spec.steps * spec.tokens_per_step, length));
  RF_ASSIGN_OR_RETURN(inputs.held_out, Sequences(context, "validation.jsonl", *tokenizer, kHeldOutTokens, length));
  const recover::RecoverSettings settings{.steps = spec.steps,
                                          .tokens_per_step = spec.tokens_per_step,
                                          .learning_rate = spec.learning_rate,
                                          .norm_learning_rate = spec.learning_rate,
                                          .layer_weight = spec.layer_weight,
                                          .evaluate_every = spec.evaluate_every,
                                          .patience = spec.patience,
                                          .checkpoint_every = spec.checkpoint_every};
  RF_ASSIGN_OR_RETURN(const recover::RecoverResult result,
                      recover::Recover(inputs, settings, {.folder = context.checkpoints, .resume = context.resume},
                                       context.events, &quantized));
  Report(result, context);
  RF_RETURN_IF_ERROR(Gate(spec.gate, *source, student, quantized, held_out, context));
  return quantize::SaveQuantized(quantized, context.outputs);
}

}  // namespace refinery::task
