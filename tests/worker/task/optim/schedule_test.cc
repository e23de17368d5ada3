#include "worker/task/optim/schedule.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>

namespace refinery::optim {
namespace {

// Method: closed form of each part.
TEST(ScheduleTest, WarmsUpLinearlyThenFollowsHalfACosine) {
  const Schedule schedule{.peak = 2.0, .steps = 20, .warmup_fraction = 0.2};
  EXPECT_EQ(schedule.WarmupSteps(), 4);
  EXPECT_DOUBLE_EQ(schedule.At(0), 0.5);
  EXPECT_DOUBLE_EQ(schedule.At(3), 2.0);
  EXPECT_DOUBLE_EQ(schedule.At(4), 2.0);
  EXPECT_DOUBLE_EQ(schedule.At(12), 1.0);  // half-way down
  EXPECT_DOUBLE_EQ(schedule.At(19), 1 + std::cos(std::numbers::pi * 15 / 16));
  EXPECT_NEAR(schedule.At(20), 0.0, 1e-15);
}

TEST(ScheduleTest, EveryStepOfAShortRunLearns) {
  for (int64_t steps = 1; steps < 12; ++steps) {
    for (const double fraction : {0.0, 0.1, 1.0}) {
      const Schedule schedule{.peak = 1e-3, .steps = steps, .warmup_fraction = fraction};
      for (int64_t step = 0; step < steps; ++step) {
        EXPECT_GT(schedule.At(step), 0) << steps << " " << step;
        EXPECT_LE(schedule.At(step), 1e-3);
      }
    }
  }
}

TEST(ScheduleTest, RoundsWarmUpToWholeSteps) {
  EXPECT_EQ((Schedule{.steps = 30, .warmup_fraction = 0.1}.WarmupSteps()), 3);
  EXPECT_EQ((Schedule{.steps = 25, .warmup_fraction = 0.1}.WarmupSteps()), 3);
  EXPECT_EQ((Schedule{.steps = 25, .warmup_fraction = 0.0}.WarmupSteps()), 0);
}

}  // namespace
}  // namespace refinery::optim
