#include "worker/task/generate/cache_layout.h"

#include <gtest/gtest.h>

namespace refinery::generate {
namespace {

// 10 bytes a position, in units of 16 positions, and one byte a position that all slots share.
CacheLimits Limits(int64_t max_slots, int64_t budget, int64_t min_capacity = 0) {
  return {.max_slots = max_slots, .min_capacity = min_capacity, .budget = budget, .bytes = [](int64_t slots, int64_t capacity) {
            const int64_t positions = (capacity + 15) / 16 * 16;
            return positions * (10 * slots + 1);
          }};
}

TEST(CacheLayoutTest, WithoutABudgetTheLongestDecides) {
  const CacheLayout layout = ChooseLayout(Limits(8, 0), {100, 5000, 20});
  EXPECT_EQ(layout.slots, 8);
  EXPECT_EQ(layout.capacity, 5000);
  EXPECT_TRUE(CanFit(Limits(8, 0), 1'000'000'000));
}

TEST(CacheLayoutTest, CanFitIsExactAtTheBudget) {
  EXPECT_TRUE(CanFit(Limits(8, 11 * 64), 64));
  EXPECT_FALSE(CanFit(Limits(8, 11 * 64 - 1), 64));
  EXPECT_FALSE(CanFit(Limits(8, 11 * 64), 65));  // takes 80 positions
}

// A long request gets the room it needs when it is the first, and waits otherwise, so that short ones keep their slots.
TEST(CacheLayoutTest, TheFirstRequestAlwaysFits) {
  const CacheLimits limits = Limits(4, 41 * 160);
  const CacheLayout short_first = ChooseLayout(limits, {100, 320, 160, 20});
  EXPECT_EQ(short_first.slots, 4);
  EXPECT_EQ(short_first.capacity, 160);
  const CacheLayout long_first = ChooseLayout(limits, {320, 100, 160, 20});
  EXPECT_EQ(long_first.slots, 1);
  EXPECT_EQ(long_first.capacity, 320);
}

// Goal: no layout takes more than the budget, and the first request fits.  Method: every budget at which it can.
TEST(CacheLayoutTest, NeverExceedsTheBudget) {
  const std::vector<std::vector<int64_t>> queues = {{1}, {17, 900}, {300, 5, 40}, {64, 64, 64}, {513, 512, 511}};
  for (const std::vector<int64_t>& needs : queues) {
    for (int64_t budget = 100; budget < 60000; budget += 97) {
      const CacheLimits limits = Limits(6, budget, /*min_capacity=*/200);
      if (!CanFit(limits, needs.front())) continue;
      const CacheLayout layout = ChooseLayout(limits, needs);
      EXPECT_LE(limits.bytes(layout.slots, layout.capacity), budget);
      EXPECT_GE(layout.capacity, needs.front());
      EXPECT_GE(layout.slots, 1);
      // No slot more would fit.
      if (layout.slots < 6) {
        EXPECT_GT(limits.bytes(layout.slots + 1, layout.capacity), budget);
      }
    }
  }
}

TEST(CacheLayoutTest, TheWishedCapacityIsKeptWhereItFits) {
  EXPECT_EQ(ChooseLayout(Limits(2, 0, 4096), {10}).capacity, 4096);
  EXPECT_EQ(ChooseLayout(Limits(2, 21 * 4096, 4096), {10}).capacity, 4096);
  EXPECT_EQ(ChooseLayout(Limits(2, 21 * 4095, 4096), {10}).capacity, 10);
}

}  // namespace
}  // namespace refinery::generate
