#include "worker/task/runtime/torch.h"

#include "worker/task/calibration.h"
#include "worker/task/models.h"
#include "worker/task/quantize/model_quantizer.h"
#include "worker/task/quantize/quantized_artifact.h"
#include "worker/task/tasks.h"

namespace refinery::task {

Status Quantize(const QuantizeSpec& spec, TaskContext& context) {
  c10::InferenceMode inference;
  RF_ASSIGN_OR_RETURN(ResolvedModel student, ResolveInput(context, "student"));
  RF_ASSIGN_OR_RETURN(auto tokenizer, tokenizer::Tokenizer::Load(student.folder->path()));
  RF_ASSIGN_OR_RETURN(std::shared_ptr<model::CausalLm> lm, LoadVariant(context, student));
  RF_RETURN_IF_ERROR(quantize::CheckGroupSize(lm->config(), spec.gptq.bits, spec.gptq.group_size));

  RF_ASSIGN_OR_RETURN(std::vector<data::Example> examples, data::ReadExamples(context.inputs / "examples" / "train.jsonl"));
  RF_ASSIGN_OR_RETURN(std::vector<data::Example> validation, data::ReadExamples(context.inputs / "examples" / "validation.jsonl"));
  examples.insert(examples.end(), validation.begin(), validation.end());
  RF_ASSIGN_OR_RETURN(Calibration calibration, MakeCalibration(examples, *tokenizer, spec.gptq.calibration_tokens, spec.gptq.sequence_length));
  if (calibration.passes > 1)
    context.events.Note("calibration_repeats",
                        Join("the ", calibration.examples, " curated examples were shown ", calibration.passes, " times to reach ",
                             spec.gptq.calibration_tokens, " calibration tokens"));

  quantize::GptqSettings settings{.bits = spec.gptq.bits, .group_size = spec.gptq.group_size, .damp_fraction = spec.gptq.damp_fraction};
  quantize::QuantizedModel quantized = quantize::QuantizeModel(*lm, calibration.sequences, settings, context.events);
  double worst = 0, sum = 0, rounding = 0;
  for (const auto& [module, report] : quantized.reports) {
    for (const std::string& note : report.notes) context.events.Note("gptq_fallback", Join(module, ": ", note));
    worst = std::max(worst, report.relative_error);
    sum += report.relative_error;
    rounding += report.rtn_relative_error;
  }
  auto modules = static_cast<double>(quantized.reports.size());
  context.events.Measure({.name = "relative_error", .value = sum / modules, .count = quantized.reports.size()});
  context.events.Measure({.name = "relative_error_rounding", .value = rounding / modules, .count = quantized.reports.size()});
  context.events.Measure({.name = "relative_error_worst", .value = worst, .count = quantized.reports.size()});
  return quantize::SaveQuantized(quantized, context.outputs);
}

}  // namespace refinery::task
