#include "worker/task/optim/schedule.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace refinery::optim {

int64_t Schedule::WarmupSteps() const {
  return std::min(steps, static_cast<int64_t>(std::ceil(warmup_fraction * static_cast<double>(steps) - 1e-9)));
}

double Schedule::At(int64_t step) const {
  const int64_t warmup = WarmupSteps();
  if (step < warmup) return peak * static_cast<double>(step + 1) / static_cast<double>(warmup);
  const double progress =
      static_cast<double>(step - warmup) / static_cast<double>(std::max<int64_t>(1, steps - warmup));
  return peak * 0.5 * (1 + std::cos(std::numbers::pi * std::clamp(progress, 0.0, 1.0)));
}

}  // namespace refinery::optim
