#include "worker/task/size_budget.h"

#include "worker/task/export/stored_size.h"

namespace refinery::task {

exporting::QuantSettings LoaderSettings(const GptqSpec& gptq) {
  exporting::QuantSettings settings{.bits = gptq.bits, .group_size = gptq.group_size, .symmetric = gptq.grid != "asymmetric",
                                    .act_order = gptq.order == "classic"};
  if (gptq.HasBudget()) settings.mixed = gptq.widths;
  return settings;
}

quantize::SizeBudget BudgetOf(const GptqSpec& gptq) { return {.bits_per_weight = gptq.bits_budget, .bytes = gptq.bytes_budget}; }

StatusOr<quantize::SizeOf> StoredSize(const GptqSpec& gptq, const std::vector<std::string>& formats) {
  RF_ASSIGN_OR_RETURN(std::vector<exporting::Format> stored, exporting::FormatsOf(formats));
  return quantize::SizeOf([stored = std::move(stored), settings = LoaderSettings(gptq)](int64_t out, int64_t in, int64_t bits) {
    return exporting::LargestStoredBytes(stored, settings, out, in, bits);
  });
}

quantize::PlanRequest PlanRequestOf(const GptqSpec& gptq, int64_t calibration_tokens, int64_t held_out_tokens) {
  quantize::PlanRequest request{.calibration_tokens = calibration_tokens, .held_out_tokens = held_out_tokens, .native_stream = gptq.alpha > 0};
  if (gptq.HasBudget()) {
    request.width_tokens = quantize::kWidthTokens;
    request.copied_tokens = quantize::CopiedTokens(gptq.sequence_length);
  }
  return request;
}

}  // namespace refinery::task
