#include "server/search/space.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "server/search/sobol.h"
#include "tests/server/search/support.h"

namespace refinery::search {
namespace {

// Goal: scrambling keeps the net.  Method: of every aligned block of 16 points, one in each sixteenth of every axis,
// and for the first two axes one in each cell of a 4 x 4 grid.
TEST(SobolTest, AlignedBlocksAreStratified) {
  for (uint64_t seed : {0u, 1u, 99u}) {
    ScrambledSobol sobol(3, seed);
    for (int block = 0; block < 4; ++block) {
      std::set<int> slices[3];
      std::set<int> cells;
      for (int i = 0; i < 16; ++i) {
        const std::vector<double> point = sobol.Next();
        for (int axis = 0; axis < 3; ++axis) {
          EXPECT_GE(point[axis], 0);
          EXPECT_LT(point[axis], 1);
          slices[axis].insert(static_cast<int>(point[axis] * 16));
        }
        cells.insert(static_cast<int>(point[0] * 4) * 4 + static_cast<int>(point[1] * 4));
      }
      for (const auto& slice : slices) EXPECT_EQ(slice.size(), 16u);
      EXPECT_EQ(cells.size(), 16u);
    }
  }
}

TEST(SobolTest, SeedsGiveOtherPoints) {
  EXPECT_NE(ScrambledSobol(2, 1).Next(), ScrambledSobol(2, 2).Next());
  EXPECT_EQ(ScrambledSobol(2, 1).Next(), ScrambledSobol(2, 1).Next());
}

TEST(SpaceTest, AxesRunOverTheirRanges) {
  const v1::Recipe recipe = DemoSearch(1);
  const Space space(recipe);
  const v1::TrialSettings low = space.Decode({0, 0, 0});
  EXPECT_EQ(low.optimizer(), "muon");
  EXPECT_DOUBLE_EQ(low.learning_rate(), 1e-4);
  EXPECT_DOUBLE_EQ(low.temperature(), 1);
  const v1::TrialSettings middle = space.Decode({0.5, 0.5, 0.5});
  EXPECT_EQ(middle.optimizer(), "adamw");
  EXPECT_DOUBLE_EQ(middle.learning_rate(), 1e-3);  // logarithmic
  EXPECT_DOUBLE_EQ(middle.temperature(), 2.5);
  const v1::TrialSettings high = space.Decode({1, 1, 1});
  EXPECT_EQ(high.optimizer(), "adamw");
  EXPECT_DOUBLE_EQ(high.learning_rate(), 1e-2);
}

TEST(SpaceTest, EncodeIsTheInverseOfDecodeUpToRounding) {
  const Space space(DemoSearch(1));
  ScrambledSobol sobol(3, 5);
  for (int i = 0; i < 50; ++i) {
    const std::vector<double> uniform = sobol.Next();
    const v1::TrialSettings settings = space.Decode(uniform);
    const Eigen::VectorXd point = space.Encode(settings);
    EXPECT_EQ(point[0], uniform[0] < 0.5 ? 0 : 1);
    EXPECT_NEAR(point[1], uniform[1], 1e-3);
    EXPECT_NEAR(point[2], uniform[2], 1e-3);
    EXPECT_TRUE(SameSettings(settings, space.Decode({(point[0] + 0.5) / 2, point[1], point[2]})));
  }
}

TEST(SpaceTest, RanksAreWholeEquallyWideAndKeepTheScale) {
  v1::Recipe recipe;
  recipe.mutable_distill()->mutable_lora()->set_rank(8);
  recipe.mutable_distill()->mutable_lora()->set_lora_alpha(24);
  AddParameter(&recipe, "lora_rank", 4, 7);
  FillDefaults(&recipe);
  const Space space(recipe);
  EXPECT_EQ(space.Size(), 4);
  std::vector<int> counts(8);
  for (int i = 0; i < 400; ++i) {
    const v1::TrialSettings settings = space.Decode({(i + 0.5) / 400});
    ++counts[settings.lora_rank()];
    EXPECT_DOUBLE_EQ(settings.lora_alpha(), 3.0 * settings.lora_rank());
  }
  EXPECT_THAT(counts, ::testing::ElementsAre(0, 0, 0, 0, 100, 100, 100, 100));
}

TEST(SpaceTest, WhatIsNotSearchedComesFromTheRecipe) {
  v1::Recipe recipe;
  recipe.mutable_distill()->set_kl_weight(0.6);
  recipe.mutable_distill()->set_temperature(1.5);
  recipe.mutable_distill()->mutable_optimizer()->mutable_muon()->set_learning_rate(7e-3);
  recipe.mutable_distill()->mutable_optimizer()->mutable_muon()->set_momentum(0.8);
  AddOptimizers(&recipe);
  FillDefaults(&recipe);
  const Space space(recipe);
  const v1::TrialSettings muon = space.Decode({0.1});
  EXPECT_EQ(muon.optimizer(), "muon");
  EXPECT_EQ(muon.learning_rate(), 7e-3);
  EXPECT_EQ(muon.momentum(), 0.8);
  EXPECT_EQ(muon.kl_weight(), 0.6);
  EXPECT_EQ(muon.temperature(), 1.5);
  // The other optimizer has its own defaults.
  const v1::TrialSettings adamw = space.Decode({0.9});
  EXPECT_EQ(adamw.optimizer(), "adamw");
  EXPECT_EQ(adamw.learning_rate(), 1e-3);
  EXPECT_EQ(adamw.beta1(), 0.9);
  EXPECT_EQ(adamw.beta2(), 0.999);
  EXPECT_EQ(adamw.momentum(), 0);
  EXPECT_EQ(adamw.kl_weight(), 0.6);
}

}  // namespace
}  // namespace refinery::search
