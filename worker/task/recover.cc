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

constexpr int64_t kValidationTokens = 4096;
constexpr double kWideRate = 0.0025, kNarrowRate = 0.004;  // from 4 bits a weight, and below: as common/recipe.cc

// The job's own curated examples of one split, packed into sequences of about `tokens` tokens together.
StatusOr<std::vector<std::vector<int32_t>>> Sequences(const TaskContext& context, const char* split,
                                                      const tokenizer::Tokenizer& tokenizer, int64_t tokens, int64_t length) {
  RF_ASSIGN_OR_RETURN(const std::vector<data::Example> examples, data::ReadExamples(context.inputs / "examples" / split));
  RF_ASSIGN_OR_RETURN(Calibration packed, MakeCalibration(examples, tokenizer, tokens, length));
  return std::move(packed.sequences);
}

// Of the codes, over all weights.
double MeanBits(const quantize::QuantizedModel& quantized) {
  double bits = 0, weights = 0;
  for (const auto& [module, linear] : quantized.linears) {
    const auto count = static_cast<double>(linear.codes.numel());
    weights += count;
    bits += count * static_cast<double>(linear.bits);
  }
  return bits / std::max(1.0, weights);
}

void Report(const recover::RecoverResult& result, TaskContext& context) {
  const auto count = static_cast<uint64_t>(kValidationTokens);
  context.events.Measure({.name = "kl_before_recovery", .value = result.kl_before, .count = count, .unit = "nats"});
  context.events.Measure({.name = "kl_after_recovery", .value = result.kl_after, .count = count, .unit = "nats"});
  context.events.Measure({.name = "recovery_steps", .value = static_cast<double>(result.steps), .count = 1});
  if (result.stopped_early)
    context.events.Note("recover_stopped_early", Join("the validation KL did not get better after step ", result.best_step,
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
  double learning_rate = spec.learning_rate;
  if (learning_rate == 0) {
    learning_rate = MeanBits(quantized) < 4 ? kNarrowRate : kWideRate;
    context.events.Note("recover_learning_rate", Join("the peak is ", learning_rate, ", for ", MeanBits(quantized), " bits a weight on average"));
  }
  recover::RecoverInputs inputs{.source = source.get(), .seed = context.seed};
  RF_ASSIGN_OR_RETURN(inputs.train, Sequences(context, "train.jsonl", *tokenizer, spec.steps * spec.tokens_per_step, length));
  RF_ASSIGN_OR_RETURN(inputs.validation, Sequences(context, "validation.jsonl", *tokenizer, kValidationTokens, length));
  const recover::RecoverSettings settings{.steps = spec.steps,
                                          .tokens_per_step = spec.tokens_per_step,
                                          .learning_rate = learning_rate,
                                          .norm_learning_rate = learning_rate,
                                          .layer_weight = spec.layer_weight,
                                          .evaluate_every = spec.evaluate_every,
                                          .patience = spec.patience,
                                          .checkpoint_every = spec.checkpoint_every};
  RF_ASSIGN_OR_RETURN(const recover::RecoverResult result,
                      recover::Recover(inputs, settings, {.folder = context.checkpoints, .resume = context.resume},
                                       context.events, &quantized));
  if (quantized.recovery.is_object()) quantized.recovery["sequence_length"] = length;
  Report(result, context);
  RF_RETURN_IF_ERROR(Gate(spec.gate, *source, student, quantized, held_out, context));
  return quantize::SaveQuantized(quantized, context.outputs);
}

}  // namespace refinery::task
