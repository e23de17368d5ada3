#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/simulation/options.h"

namespace refinery::simulation {
namespace {

// Goal: no invariant of auditor.h breaks, whatever goes wrong.  Method: 300 runs, each with a subset of all faults.
// `refinery_simulation --seeds 1..100000` runs more.
TEST(SimulationTest, NoInvariantBreaksIn300Runs) {
  Result total;
  for (uint64_t seed = 1; seed <= 300; ++seed) {
    SimulationOptions options{.seed = seed};
    const Result result = Simulate(options);
    ASSERT_TRUE(result.ok) << result.failure << "\n  repeat it: " << CommandOf(options)
                           << "\n  smaller:   " << CommandOf(Shrink(options, result));
    total.jobs += result.jobs;
    total.succeeded += result.succeeded;
    total.restarts += result.restarts;
    total.late_commits += result.late_commits;
    total.late_commits_refused += result.late_commits_refused;
  }
  // The runs are worth something only if things happen in them.
  EXPECT_GT(total.succeeded, total.jobs / 4);
  EXPECT_GT(total.restarts, 600u);
  EXPECT_GT(total.late_commits, 30u);
  EXPECT_EQ(total.late_commits_refused, total.late_commits);
}

// 3113: late messages of a worker that did not know of a lease yet took it away while it was on its way to the worker.
// The others: the late end of a lease that had run out was taken for one heard before, when the task had its result from the cache since.
TEST(SimulationTest, SeedsThatFoundBugs) {
  for (const uint64_t seed : {3113ul, 31624ul, 42885ul, 47216ul, 48236ul}) {
    const Result result = Simulate({.seed = seed});
    EXPECT_TRUE(result.ok) << seed << ": " << result.failure;
  }
}

TEST(SimulationTest, ARunIsAFunctionOfItsSeed) {
  const Result once = Simulate({.seed = 7}), again = Simulate({.seed = 7});
  EXPECT_EQ(once.time, again.time);
  EXPECT_EQ(once.events, again.events);
  EXPECT_EQ(once.attempts, again.attempts);
}

struct Bug {
  const char* name;
  Mutations mutations;
};
class PlantedBugTest : public ::testing::TestWithParam<Bug> {};

// Goal: the simulation finds bugs.  Method: one is planted; some seed of the first 300 must break an invariant, and still does
// after shrinking, with no more of anything.
TEST_P(PlantedBugTest, IsFound) {
  for (uint64_t seed = 1; seed <= 300; ++seed) {
    SimulationOptions options{.seed = seed};
    options.mutations = GetParam().mutations;
    const Result result = Simulate(options);
    if (result.ok) continue;
    const SimulationOptions smaller = Shrink(options, result);
    const Result repeated = Simulate(smaller);
    EXPECT_FALSE(repeated.ok);
    EXPECT_LE(repeated.used_jobs, result.used_jobs);
    EXPECT_LE(repeated.used_workers, result.used_workers);
    std::cout << GetParam().name << ": found at seed " << seed << ": " << repeated.failure << "\n  " << CommandOf(smaller) << "\n";
    return;
  }
  FAIL() << "300 seeds did not find it";
}
INSTANTIATE_TEST_SUITE_P(Bugs, PlantedBugTest,
                         ::testing::Values(Bug{"EpochIgnored", {.core = {.ignore_epoch = true}}},
                                           Bug{"NoGraceAfterARestart", {.core = {.no_grace = true}}},
                                           Bug{"LossIgnored", {.core = {.ignore_losses = true}}},
                                           Bug{"CommitBeforeBlob", {.commit_before_blob = true}},
                                           Bug{"ReplyBeforeAppend", {.reply_before_append = true}},
                                           Bug{"NoFenceOnTheWorker", {.no_fence = true}}),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace refinery::simulation
