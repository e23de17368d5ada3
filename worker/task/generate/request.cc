#include "worker/task/generate/request.h"

#include <cmath>

namespace refinery::generate {
namespace {

constexpr double kMostPenalty = 2.0;  // the bound of OpenAI's interface, which vLLM keeps

// Written so that NaN fails.
Status CheckBetween(const char* name, double value, double low, double high) {
  if (value >= low && value <= high) return absl::OkStatus();
  return InvalidArgument(name, " is ", value, "; it must be between ", low, " and ", high);
}

}  // namespace

Status CheckSampling(const SamplingSettings& settings) {
  if (!(settings.temperature >= 0) || std::isinf(settings.temperature))
    return InvalidArgument("temperature is ", settings.temperature, "; it must be 0 (greedy) or a positive number");
  if (settings.top_k < 0) return InvalidArgument("top_k is ", settings.top_k, "; it must be 0 (off) or a positive number");
  RF_RETURN_IF_ERROR(CheckBetween("top_p", settings.top_p, 0, 1));
  RF_RETURN_IF_ERROR(CheckBetween("min_p", settings.min_p, 0, 1));
  if (!(settings.repetition_penalty > 0) || std::isinf(settings.repetition_penalty))
    return InvalidArgument("repetition_penalty is ", settings.repetition_penalty, "; it must be a positive number (1 = off)");
  RF_RETURN_IF_ERROR(CheckBetween("presence_penalty", settings.presence_penalty, -kMostPenalty, kMostPenalty));
  return CheckBetween("frequency_penalty", settings.frequency_penalty, -kMostPenalty, kMostPenalty);
}

}  // namespace refinery::generate
