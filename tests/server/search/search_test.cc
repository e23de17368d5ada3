#include "server/search/search.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "tests/server/search/support.h"
#include "tests/support/status_matchers.h"

namespace refinery::search {
namespace {

using refinery::testing::StatusCodeIs;

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// A smooth loss with its minimum at learning rate 1e-3, temperature 2; AdamW is worse by 0.3.
double Loss(const v1::TrialSettings& settings) {
  const double rate = std::log10(settings.learning_rate()) + 3;
  const double temperature = settings.temperature() - 2;
  return 2 + rate * rate + 0.2 * temperature * temperature + (settings.optimizer() == "adamw" ? 0.3 : 0);
}

// Runs the whole study; `objective` gives the replicates' values.
template <typename Objective>
std::vector<v1::Trial> RunStudy(const v1::Recipe& recipe, Objective objective) {
  std::vector<v1::Trial> trials;
  while (trials.size() < TrialCount(recipe)) {
    const size_t begin = trials.size();
    while (CanSuggest(recipe, trials, static_cast<uint32_t>(trials.size())))
      trials.push_back(Suggest(recipe, trials, static_cast<uint32_t>(trials.size())).value());
    EXPECT_GT(trials.size(), begin);
    if (trials.size() == begin) break;
    for (size_t i = begin; i < trials.size(); ++i) Finish(&trials[i], objective(trials[i]));
  }
  return trials;
}

std::vector<v1::Trial> RunStudy(const v1::Recipe& recipe) {
  return RunStudy(recipe, [](const v1::Trial& trial) {
    return std::vector<double>{Loss(trial.settings()) - 0.01, Loss(trial.settings()) + 0.01};
  });
}

TEST(SearchTest, NoSearchIsOneTrialOfTheRecipe) {
  v1::Recipe recipe;
  recipe.mutable_distill()->mutable_optimizer()->mutable_adamw()->set_learning_rate(3e-4);
  FillDefaults(&recipe);
  EXPECT_EQ(TrialCount(recipe), 1u);
  ASSERT_TRUE(CanSuggest(recipe, {}, 0));
  const v1::Trial trial = Suggest(recipe, {}, 0).value();
  EXPECT_EQ(trial.origin(), "recipe");
  EXPECT_EQ(trial.state(), v1::Trial::ACTIVE);
  EXPECT_EQ(trial.settings().optimizer(), "adamw");
  EXPECT_EQ(trial.settings().learning_rate(), 3e-4);
  EXPECT_EQ(trial.replicates_size(), 1);
  EXPECT_FALSE(CanSuggest(recipe, {trial}, 0));
  EXPECT_FALSE(CanSuggest(recipe, {trial}, 1));
}

TEST(SearchTest, SobolTrialsAreOneRoundAndTheRestWaits) {
  const v1::Recipe recipe = DemoSearch(1, 8, 4);
  std::vector<v1::Trial> trials;
  EXPECT_FALSE(CanSuggest(recipe, trials, 1)) << "trial 0 comes first";
  for (uint32_t i = 0; i < 4; ++i) {
    ASSERT_TRUE(CanSuggest(recipe, trials, i));
    trials.push_back(Suggest(recipe, trials, i).value());
    EXPECT_EQ(trials.back().origin(), "sobol");
    EXPECT_EQ(trials.back().replicates_size(), 2);
  }
  for (uint32_t i = 0; i < 4; ++i) {
    EXPECT_FALSE(CanSuggest(recipe, trials, 4)) << i << " finished";
    EXPECT_THAT(Suggest(recipe, trials, 4), StatusCodeIs(absl::StatusCode::kFailedPrecondition));
    Finish(&trials[i], {2.0, 2.1});
  }
  ASSERT_TRUE(CanSuggest(recipe, trials, 4));
  trials.push_back(Suggest(recipe, trials, 4).value());
  EXPECT_EQ(trials.back().origin(), "expected_improvement");
  EXPECT_GT(trials.back().expected_improvement(), 0);
  EXPECT_FALSE(CanSuggest(recipe, trials, 5)) << "rounds of one";
}

TEST(SearchTest, EveryOptimizerIsAmongTheFirstTwoTrials) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const v1::Recipe recipe = DemoSearch(seed);
    std::set<std::string> optimizers;
    std::vector<v1::Trial> trials;
    for (uint32_t i = 0; i < 2; ++i) {
      trials.push_back(Suggest(recipe, trials, i).value());
      optimizers.insert(trials.back().settings().optimizer());
    }
    EXPECT_EQ(optimizers.size(), 2u) << "seed " << seed;
  }
}

TEST(SearchTest, SameSeedSameStudyOtherSeedOtherStudy) {
  auto text = [](const std::vector<v1::Trial>& trials) {
    std::string all;
    for (const v1::Trial& trial : trials) all += trial.SerializeAsString();
    return all;
  };
  EXPECT_EQ(text(RunStudy(DemoSearch(3))), text(RunStudy(DemoSearch(3))));
  EXPECT_NE(text(RunStudy(DemoSearch(3))), text(RunStudy(DemoSearch(4))));
}

// Goal: the suggestion of a trial does not depend on which trials of its round are done by then.
TEST(SearchTest, ResultsOfTheSameRoundDoNotCount) {
  v1::Recipe recipe = DemoSearch(5, 8, 4);
  recipe.mutable_search()->set_parallel(2);
  std::vector<v1::Trial> trials;
  for (uint32_t i = 0; i < 4; ++i) trials.push_back(Suggest(recipe, trials, i).value());
  for (v1::Trial& trial : trials) Finish(&trial, {Loss(trial.settings()), Loss(trial.settings())});
  trials.push_back(Suggest(recipe, trials, 4).value());
  const v1::Trial while_running = Suggest(recipe, trials, 5).value();
  Finish(&trials[4], {1.0, 1.0});
  const v1::Trial when_finished = Suggest(recipe, trials, 5).value();
  EXPECT_EQ(while_running.SerializeAsString(), when_finished.SerializeAsString());
}

TEST(SearchTest, TheModelClosesInOnTheMinimum) {
  int closer = 0;
  for (uint64_t seed = 0; seed < 4; ++seed) {
    const std::vector<v1::Trial> trials = RunStudy(DemoSearch(seed, 14, 5));
    double first = INFINITY;
    double last = INFINITY;
    for (size_t i = 0; i < trials.size(); ++i)
      (i < 5 ? first : last) = std::min(i < 5 ? first : last, trials[i].mean());
    closer += last < first;
    EXPECT_LT(last, 2.05) << "seed " << seed;
  }
  EXPECT_GE(closer, 3);
}

TEST(SearchTest, NothingIsSuggestedTwice) {
  v1::Recipe recipe;
  recipe.mutable_search()->set_trials(8);
  AddOptimizers(&recipe);
  AddParameter(&recipe, "lora_rank", 2, 5);
  FillDefaults(&recipe);
  const std::vector<v1::Trial> trials =
      RunStudy(recipe, [](const v1::Trial& trial) { return std::vector<double>{1.0 * trial.settings().lora_rank()}; });
  ASSERT_EQ(trials.size(), 8u);  // the whole space
  std::set<std::string> seen;
  for (const v1::Trial& trial : trials) seen.insert(trial.settings().SerializeAsString());
  EXPECT_EQ(seen.size(), 8u);
}

// Goal: a region that diverges is avoided.  Method: high learning rates diverge; the model's own trials rarely go
// there.
TEST(SearchTest, DivergedTrialsRepel) {
  const std::vector<v1::Trial> trials = RunStudy(DemoSearch(2, 14, 6), [](const v1::Trial& trial) {
    if (trial.settings().learning_rate() > 2e-3) return std::vector<double>{kNan, 3.0};
    return std::vector<double>{Loss(trial.settings()), Loss(trial.settings())};
  });
  int diverged_at_first = 0;
  int diverged_later = 0;
  for (const v1::Trial& trial : trials) {
    const bool diverged = trial.state() == v1::Trial::INFEASIBLE;
    (trial.index() < 6 ? diverged_at_first : diverged_later) += diverged;
  }
  EXPECT_GE(diverged_at_first, 1);
  EXPECT_LE(diverged_later, 3) << "of 8";
}

TEST(SearchTest, AStudyInWhichAllDivergesStillSuggests) {
  const std::vector<v1::Trial> trials = RunStudy(DemoSearch(2, 8, 3), [](const v1::Trial&) {
    return std::vector<double>{kNan, kNan};
  });
  EXPECT_EQ(trials.size(), 8u);
  EXPECT_TRUE(SelectBest(trials).empty());
}

TEST(SearchTest, ConcludeTakesMeanAndStandardError) {
  v1::Trial trial;
  Finish(&trial, {1.0, 2.0, 6.0});
  EXPECT_EQ(trial.state(), v1::Trial::SUCCEEDED);
  EXPECT_DOUBLE_EQ(trial.mean(), 3.0);
  EXPECT_DOUBLE_EQ(trial.standard_error(), std::sqrt(7.0 / 3));  // sample variance 7
  Finish(&trial, {1.5});
  EXPECT_DOUBLE_EQ(trial.mean(), 1.5);
  EXPECT_EQ(trial.standard_error(), 0);
  Finish(&trial, {1.5, kNan});
  EXPECT_EQ(trial.state(), v1::Trial::INFEASIBLE);

  v1::Trial running;
  running.set_state(v1::Trial::ACTIVE);
  running.add_replicates()->set_finished(true);
  running.add_replicates();
  Conclude(&running);
  EXPECT_EQ(running.state(), v1::Trial::ACTIVE);
}

TEST(SearchTest, SelectBestTakesTheLowestAndTiesGoToTheLowerIndex) {
  std::vector<v1::Trial> trials(5);
  for (uint32_t i = 0; i < 5; ++i) {
    trials[i].set_index(i);
    trials[i].mutable_settings()->set_optimizer(i < 3 ? "muon" : "adamw");
  }
  Finish(&trials[0], {2.0, 2.2});
  Finish(&trials[1], {1.5, 1.1, 1.1});
  Finish(&trials[2], {kNan, 0.1, 0.1});
  Finish(&trials[3], {1.4, 1.6});
  Finish(&trials[4], {1.5, 1.5});
  trials[1].set_mean(1.5);  // a tie between trials 1, 3 and 4
  std::swap(trials[0], trials[4]);
  std::vector<std::string> lines;
  for (const auto& best : SelectBest(trials))
    lines.push_back(Join(best.selector(), " ", best.trial(), " ", best.replicate()));
  EXPECT_THAT(lines, ::testing::UnorderedElementsAre("best 1 1", "best-muon 1 1", "best-adamw 3 0"));
}

}  // namespace
}  // namespace refinery::search
