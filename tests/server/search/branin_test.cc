// The search against random search on Branin's function (minimum 0.397887), through the public interface.

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>
#include <random>

#include "tests/server/search/support.h"

namespace refinery::search {
namespace {

constexpr double kMinimum = 0.39788735772973816;
constexpr uint32_t kTrials = 24;

// u and v in [0, 1].
double Branin(double u, double v) {
  constexpr double kPi = std::numbers::pi;
  const double x = 15 * u - 5;
  const double y = 15 * v;
  const double inner = y - 5.1 / (4 * kPi * kPi) * x * x + 5 / kPi * x - 6;
  return inner * inner + 10 * (1 - 1 / (8 * kPi)) * std::cos(x) + 10;
}

// Learning rate and temperature stand for the two axes.
v1::Recipe BraninRecipe(uint64_t seed, uint32_t parallel) {
  v1::Recipe recipe;
  recipe.set_seed(seed);
  recipe.mutable_search()->set_trials(kTrials);
  recipe.mutable_search()->set_initial_trials(6);
  recipe.mutable_search()->set_parallel(parallel);
  AddParameter(&recipe, "learning_rate", 1, 2);
  AddParameter(&recipe, "temperature", 1, 2);
  FillDefaults(&recipe);
  return recipe;
}

double Regret(uint64_t seed, uint32_t parallel) {
  const v1::Recipe recipe = BraninRecipe(seed, parallel);
  std::vector<v1::Trial> trials;
  double best = INFINITY;
  while (trials.size() < kTrials) {
    const size_t begin = trials.size();
    while (CanSuggest(recipe, trials, static_cast<uint32_t>(trials.size())))
      trials.push_back(Suggest(recipe, trials, static_cast<uint32_t>(trials.size())).value());
    EXPECT_GT(trials.size(), begin);
    if (trials.size() == begin) break;
    for (size_t i = begin; i < trials.size(); ++i) {
      const v1::TrialSettings& settings = trials[i].settings();
      const double value = Branin(settings.learning_rate() - 1, settings.temperature() - 1);
      best = std::min(best, value);
      Finish(&trials[i], {value});
    }
  }
  return best - kMinimum;
}

double RandomRegret(uint32_t seed) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> uniform(0, 1);
  double best = INFINITY;
  for (uint32_t i = 0; i < kTrials; ++i) best = std::min(best, Branin(uniform(random), uniform(random)));
  return best - kMinimum;
}

// Goal: the model earns its keep.  Method: six seeds, same budget; the worst of ours is better than the mean of random
// search, our mean ten times better.  (Random search at this budget lies near 1 to 2.)
TEST(BraninTest, BeatsRandomSearch) {
  double random = 0;
  for (uint32_t seed = 0; seed < 200; ++seed) random += RandomRegret(seed) / 200;
  double ours = 0;
  for (uint64_t seed = 0; seed < 6; ++seed) {
    const double regret = Regret(seed, 1);
    EXPECT_LT(regret, random) << "seed " << seed;
    ours += regret / 6;
  }
  RecordProperty("regret", std::to_string(ours));
  RecordProperty("random_regret", std::to_string(random));
  EXPECT_LT(ours, random / 10);
}

TEST(BraninTest, RoundsOfFourAreStillBetterThanRandom) {
  double random = 0;
  for (uint32_t seed = 0; seed < 200; ++seed) random += RandomRegret(seed) / 200;
  double ours = 0;
  for (uint64_t seed = 0; seed < 4; ++seed) ours += Regret(seed, 4) / 4;
  EXPECT_LT(ours, random / 4);
}

}  // namespace
}  // namespace refinery::search
