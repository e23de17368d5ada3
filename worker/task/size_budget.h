// worker/task/size_budget.h
//
// What a recipe's quantization settings mean to exports and to a size budget.
//
// Errors: INVALID_ARGUMENT.  Threads: functions.

#pragma once

#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/export/loader_lint.h"
#include "worker/task/quantize/mixed_bits.h"
#include "worker/task/quantize/quantize_plan.h"
#include "worker/task/spec.h"

namespace refinery::task {

// As loaders will see the result. Under a budget every width of `widths` counts: which layer gets which is not known yet.
exporting::QuantSettings LoaderSettings(const GptqSpec& gptq);

quantize::SizeBudget BudgetOf(const GptqSpec& gptq);

// The bytes that a budget counts: those of the largest of `formats` (names as in recipes).
StatusOr<quantize::SizeOf> StoredSize(const GptqSpec& gptq, const std::vector<std::string>& formats);

// What MakePlan is asked. `held_out_tokens` as measured along the way.
quantize::PlanRequest PlanRequestOf(const GptqSpec& gptq, int64_t calibration_tokens, int64_t held_out_tokens);

}  // namespace refinery::task
