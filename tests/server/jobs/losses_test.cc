// Artifacts that the store has lost after the task that made them was done: it runs again within the same job.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "server/jobs/retry.h"
#include "tests/server/jobs/tiny_job.h"
#include "tests/support/status_matchers.h"

namespace refinery::jobs {
namespace {

using refinery::testing::CoreDriver;
using refinery::testing::IsOk;
using ::testing::HasSubstr;

// A core whose store lacks what `lost` names.
class LossesTest : public ::testing::Test {
 protected:
  LossesTest() : driver_({.is_complete = [this](const std::string& digest) { return !lost_.contains(digest); }}) {}

  // What the agent reports when an input cannot be downloaded.
  Status Miss(const v1::Lease& lease) {
    return driver_.Complete(CoreDriver::Failure(lease, v1::INFRA, "input: there is no blob"));
  }
  v1::Lease Until(const std::string& path) {
    return driver_.RunUntil([&](const v1::Lease& lease) { return lease.token().path() == path; });
  }
  // Everything is made again as it was.
  void Finish() {
    for (v1::Lease lease = driver_.Grant(); !lease.token().path().empty(); lease = driver_.Grant()) {
      const v1::CompleteTaskRequest end = CoreDriver::Success(lease, CoreDriver::LossOf(lease));
      lost_.erase(end.success().output().digest());
      ASSERT_THAT(driver_.Complete(end), IsOk());
    }
    driver_.RunAll();
  }
  void ExpectReplays() {
    EXPECT_EQ(Dump(driver_.Replayed().state()), Dump(driver_.core.state()));
    Core restored(CoreDriver::WithVersion({}));
    ASSERT_THAT(restored.Restore(driver_.core.Snapshot()), IsOk());
    EXPECT_EQ(Dump(restored.state()), Dump(driver_.core.state()));
  }
  // A training commits a checkpoint and loses its data, which is made again, as `digest` unless that is empty. Its next lease.
  v1::Lease TrainAgainAfterALoss(const std::string& digest) {
    RF_CHECK(driver_.Create("a").ok());
    const v1::Lease first = driver_.RunUntil([](const v1::Lease& l) { return l.spec().has_train(); });
    v1::CommitCheckpointRequest checkpoint;
    *checkpoint.mutable_lease() = first.token();
    checkpoint.set_step(10);
    checkpoint.mutable_checkpoint()->set_digest(DigestOf("checkpoint"));
    RF_CHECK(driver_.core.CommitCheckpoint(checkpoint, driver_.now, &driver_.events).ok());
    lost_.insert(driver_.Task("a", "curate").output.digest());
    RF_CHECK(Miss(first).ok());
    driver_.Wait(10'000);
    const auto grant = [&](const std::string& path) {
      return driver_.core.Grant("a", path, "w1", "i1", driver_.now, &driver_.events).value();
    };
    v1::CompleteTaskRequest end = CoreDriver::Success(grant("curate"));
    if (!digest.empty()) end.mutable_success()->mutable_output()->set_digest(digest);
    lost_.clear();
    RF_CHECK(driver_.Complete(end).ok());
    driver_.Wait(10'000);
    const v1::Lease again = grant(first.token().path());
    ExpectReplays();
    return again;
  }
  int LostEvents() const {
    return static_cast<int>(std::count_if(driver_.events.begin(), driver_.events.end(),
                                          [](const v1::Event& event) { return event.has_artifact_lost(); }));
  }
  static std::string Undisturbed() {
    CoreDriver driver;
    RF_CHECK(driver.Create("a").ok());
    driver.RunAll();
    return driver.Job("a").artifact.digest();
  }

  std::set<std::string> lost_;
  CoreDriver driver_;
};

// Goal: the producer runs again, its consumer waits and is charged nothing, the end is that of an undisturbed run.
TEST_F(LossesTest, TheMakerOfALostInputRunsAgain) {
  ASSERT_THAT(driver_.Create("a"), IsOk());
  const v1::Lease lease = Until("curate");
  ASSERT_EQ(lease.token().path(), "curate");
  const std::string maker = driver_.Job("a").plan.tasks[driver_.Job("a").index.at("curate")].needs.front();
  lost_.insert(driver_.Task("a", maker).output.digest());
  ASSERT_THAT(Miss(lease), IsOk());
  EXPECT_EQ(driver_.Task("a", maker).state, v1::Task::READY);
  EXPECT_EQ(driver_.Task("a", "curate").state, v1::Task::BLOCKED);
  EXPECT_EQ(driver_.Task("a", "curate").infra_failures, 0u);
  EXPECT_EQ(driver_.Task("a", maker).losses, 1u);
  ExpectReplays();
  Finish();
  EXPECT_EQ(driver_.Job("a").state, v1::Job::SUCCEEDED) << driver_.Job("a").reason;
  EXPECT_EQ(driver_.Job("a").artifact.digest(), Undisturbed());
  EXPECT_EQ(LostEvents(), 1);
  ExpectReplays();
}

// Goal: what the maker itself needs is made again at once when it is gone too.  Method: everything made so far is lost; a restart in
// the middle changes nothing.
TEST_F(LossesTest, AWholeChainOfLossesIsMadeAgain) {
  ASSERT_THAT(driver_.Create("a"), IsOk());
  const v1::Lease lease = driver_.RunUntil([](const v1::Lease& l) { return l.spec().has_train(); });
  for (const TaskState& task : driver_.Job("a").tasks) {
    if (!task.output.digest().empty()) lost_.insert(task.output.digest());
  }
  ASSERT_GT(lost_.size(), 4u);
  ASSERT_THAT(Miss(lease), IsOk());
  EXPECT_GT(LostEvents(), 3);
  ExpectReplays();
  Finish();
  EXPECT_EQ(driver_.Job("a").state, v1::Job::SUCCEEDED) << driver_.Job("a").reason;
  EXPECT_EQ(driver_.Job("a").artifact.digest(), Undisturbed());
  ExpectReplays();
}

// Goal: the best adapter, lost after the search, is trained again and the search's verdict stays; a cancelled job can be opened again.
TEST_F(LossesTest, TheBestAdapterIsTrainedAgain) {
  ASSERT_THAT(driver_.Create("a"), IsOk());
  const v1::Lease lease = driver_.RunUntil([](const v1::Lease& l) { return l.spec().has_merge(); });
  ASSERT_TRUE(lease.spec().has_merge());
  const auto best = driver_.Job("a").best.at("best");
  const std::string path = Join("trial/", best.first, "/replicate/", best.second);
  lost_.insert(driver_.Task("a", path).output.digest());
  ASSERT_THAT(Miss(lease), IsOk());
  EXPECT_EQ(driver_.Task("a", path).state, v1::Task::READY);
  ExpectReplays();
  ASSERT_THAT(driver_.core.CancelJob("a", "", driver_.now, &driver_.events), IsOk());
  ExpectReplays();
  ASSERT_THAT(driver_.core.RetryJob("a", "", driver_.now, &driver_.events), IsOk());
  ExpectReplays();
  Finish();
  EXPECT_EQ(driver_.Job("a").state, v1::Job::SUCCEEDED) << driver_.Job("a").reason;
  EXPECT_EQ(driver_.Job("a").best.at("best"), best);
  EXPECT_EQ(driver_.Job("a").artifact.digest(), Undisturbed());
  ExpectReplays();
}

// Goal: upkeep's news open what somebody still needs, and nothing else.
TEST_F(LossesTest, UpkeepOpensOnlyWhatIsNeeded) {
  ASSERT_THAT(driver_.Create("a"), IsOk());
  const v1::Lease lease = driver_.RunUntil([](const v1::Lease& l) { return l.spec().has_train(); });
  const std::string needed = lease.spec().inputs(0).digest();
  const std::string stored = lease.spec().inputs(lease.spec().inputs_size() - 1).digest();
  lost_.insert(needed);
  driver_.core.OnLost({needed, stored}, driver_.now, &driver_.events);
  EXPECT_EQ(LostEvents(), 1);  // the other one is stored
  // The attempt that runs may have its copy: it goes on, and its result counts.
  EXPECT_EQ(driver_.Task("a", lease.token().path()).state, v1::Task::LEASED);
  ASSERT_THAT(driver_.Complete(CoreDriver::Success(lease, CoreDriver::LossOf(lease))), IsOk());
  ExpectReplays();
  Finish();
  EXPECT_EQ(driver_.Job("a").state, v1::Job::SUCCEEDED) << driver_.Job("a").reason;
  EXPECT_EQ(driver_.Job("a").artifact.digest(), Undisturbed());
  const size_t count = driver_.events.size();
  lost_.insert(needed);
  driver_.core.OnLost({needed}, driver_.now, &driver_.events);  // the job has ended
  EXPECT_EQ(driver_.events.size(), count);
}

// Goal: a store that loses everything ends the job in words; so does a lost upload, which nobody can make again but the user.
TEST_F(LossesTest, LossesAreBoundedAndUploadsCannotBeMadeAgain) {
  ASSERT_THAT(driver_.Create("a"), IsOk());
  v1::Lease lease = Until("curate");
  const std::string maker = driver_.Job("a").plan.tasks[driver_.Job("a").index.at("curate")].needs.front();
  uint32_t rounds = 0;
  for (; !IsTerminal(driver_.Job("a").state) && rounds < 50; ++rounds) {
    lost_.insert(driver_.Task("a", maker).output.digest());
    ASSERT_THAT(Miss(lease), IsOk());
    lost_.clear();
    lease = Until("curate");
  }
  EXPECT_EQ(rounds, kMaxLosses + 1);
  EXPECT_EQ(driver_.Job("a").state, v1::Job::FAILED);
  EXPECT_THAT(driver_.Job("a").reason, HasSubstr("not in the store any more"));

  ASSERT_THAT(driver_.Create("b"), IsOk());
  lost_.insert(DigestOf("seeds"));
  for (lease = driver_.Grant(); !IsTerminal(driver_.Job("b").state); lease = driver_.Grant()) {
    ASSERT_FALSE(lease.token().path().empty());
    const bool misses = std::any_of(lease.spec().inputs().begin(), lease.spec().inputs().end(),
                                    [](const v1::ArtifactRef& input) { return input.digest() == DigestOf("seeds"); });
    ASSERT_THAT(misses ? Miss(lease) : driver_.Complete(CoreDriver::Success(lease)), IsOk());
  }
  EXPECT_EQ(driver_.Job("b").state, v1::Job::FAILED);
  EXPECT_THAT(driver_.Job("b").reason, HasSubstr("upload it again and retry the job"));
}

// Goal: without its checkpoint an attempt starts anew instead of failing over and over.
TEST_F(LossesTest, ALostCheckpointIsForgotten) {
  ASSERT_THAT(driver_.Create("a"), IsOk());
  v1::Lease lease = driver_.RunUntil([](const v1::Lease& l) { return l.spec().has_train(); });
  v1::CommitCheckpointRequest checkpoint;
  *checkpoint.mutable_lease() = lease.token();
  checkpoint.set_step(10);
  checkpoint.mutable_checkpoint()->set_digest(DigestOf("checkpoint"));
  ASSERT_THAT(driver_.core.CommitCheckpoint(checkpoint, driver_.now, &driver_.events), IsOk());
  lost_.insert(DigestOf("checkpoint"));
  ASSERT_THAT(Miss(lease), IsOk());
  ExpectReplays();
  driver_.Wait(10'000);
  lease = driver_.core.Grant("a", lease.token().path(), "w1", "i1", driver_.now, &driver_.events).value();
  EXPECT_FALSE(lease.has_checkpoint());
  EXPECT_EQ(lease.checkpoint_step(), 0u);
}

// Goal: a checkpoint is of one training on one set of inputs: when a lost input comes out otherwise, the training begins anew.
TEST_F(LossesTest, ACheckpointOfOtherInputsIsForgotten) {
  const v1::Lease lease = TrainAgainAfterALoss(DigestOf("made on another device"));
  EXPECT_FALSE(lease.has_checkpoint());
  EXPECT_EQ(lease.checkpoint_step(), 0u);
}

TEST_F(LossesTest, ACheckpointOfTheSameInputsStays) {
  const v1::Lease lease = TrainAgainAfterALoss("");
  EXPECT_TRUE(lease.has_checkpoint());
  EXPECT_EQ(lease.checkpoint_step(), 10u);
}

}  // namespace
}  // namespace refinery::jobs
