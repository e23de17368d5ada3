// worker/task/optim/schedule.h
//
// Learning rate over the optimizer steps: linear warm-up, then half a cosine down to zero.

#pragma once

#include <cstdint>

namespace refinery::optim {

struct Schedule {
  double peak = 1e-3;            // learning rate
  int64_t steps = 1;             // of the whole run, >= 1
  double warmup_fraction = 0.1;  // of the steps, in [0, 1]; rounded up to whole steps

  int64_t WarmupSteps() const;
  // The rate of step 0 .. steps-1. Warm-up reaches the peak at its last step: peak (step+1) / warm-up steps. The
  // cosine's zero lies one step after the last, so that no step is wasted.
  double At(int64_t step) const;
};

}  // namespace refinery::optim
