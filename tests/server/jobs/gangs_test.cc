// Tests of what is granted together or not at all, and of what is taken back when it could not be written.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "server/jobs/core.h"
#include "tests/server/jobs/tiny_job.h"
#include "tests/support/status_matchers.h"

namespace refinery::jobs {
namespace {

using refinery::testing::CoreDriver;
using refinery::testing::IsOk;
using refinery::testing::StatusCodeIs;
using refinery::testing::TinyRecipe;

// Goal: events that could not be written are taken back wholly: the state is that of the log, what only the process knows is kept, and
// the job goes on to the same end.  Method: a lease, a turn that is lost (a completion, a grant, a new job), Rebuild.
TEST(RebuildTest, TakesBackWhatWasNotWritten) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  const v1::Lease lease = driver.Grant();
  v1::SynchronizeRequest progress = CoreDriver::Running({lease});
  progress.mutable_running(0)->mutable_progress()->set_done(7);
  driver.core.Synchronize(progress, driver.now, &driver.events);
  const std::string before = Dump(driver.core.state());
  const size_t written = driver.events.size();

  ASSERT_THAT(driver.Complete(CoreDriver::Success(lease)), IsOk());
  ASSERT_FALSE(driver.Grant("w2").token().path().empty());
  ASSERT_THAT(driver.Create("b", "request-b"), IsOk());
  ASSERT_THAT(driver.core.PauseJob("a", "", driver.now, &driver.events), IsOk());
  driver.events.resize(written);
  ASSERT_THAT(driver.core.Rebuild([&]() -> Status {
    for (const v1::Event& event : driver.events) RF_RETURN_IF_ERROR(driver.core.Replay(event));
    return absl::OkStatus();
  }), IsOk());
  EXPECT_EQ(Dump(driver.core.state()), before);
  EXPECT_EQ(driver.Task("a", lease.token().path()).progress.done(), 7);
  EXPECT_LT(driver.Task("a", lease.token().path()).release_at.count(), 0) << "the pause was not made";

  driver.core.SetReadOnly(absl::ResourceExhaustedError("full"));
  EXPECT_THAT(driver.Complete(CoreDriver::Success(lease)), StatusCodeIs(absl::StatusCode::kResourceExhausted));
  EXPECT_THAT(driver.Create("b", "request-b"), StatusCodeIs(absl::StatusCode::kResourceExhausted));
  EXPECT_THAT(driver.core.CancelJob("a", "", driver.now, &driver.events), StatusCodeIs(absl::StatusCode::kResourceExhausted));
  EXPECT_THAT(driver.core.PauseJob("a", "", driver.now, &driver.events), StatusCodeIs(absl::StatusCode::kResourceExhausted));
  v1::SynchronizeRequest note = CoreDriver::Running({lease});
  note.mutable_running(0)->add_notes()->set_code("damping_raised");
  EXPECT_TRUE(driver.core.Synchronize(note, driver.now, &driver.events).repeat);
  EXPECT_FALSE(driver.core.Synchronize(progress, driver.now, &driver.events).repeat);
  driver.Wait(100'000);  // far beyond the lease's life: nothing ends
  EXPECT_EQ(driver.events.size(), written);
  EXPECT_EQ(Dump(driver.core.state()), before);

  driver.core.SetReadOnly(absl::OkStatus());
  driver.core.StartGrace(driver.now, &driver.events);
  driver.Wait(10'000);
  EXPECT_FALSE(driver.core.Synchronize(note, driver.now, &driver.events).repeat);
  ASSERT_THAT(driver.Complete(CoreDriver::Success(lease)), IsOk());
  driver.RunAll();
  EXPECT_EQ(driver.Job("a").state, v1::Job::SUCCEEDED);
  EXPECT_EQ(Dump(driver.Replayed().state()), Dump(driver.core.state()));
}

class GangTest : public ::testing::Test {
 protected:
  void SetUp() override {
    v1::Recipe recipe = TinyRecipe();
    recipe.mutable_data()->mutable_synthesize()->set_shards(4);
    ASSERT_THAT(driver_.Create("a", "", recipe), IsOk());
    ASSERT_THAT(driver_.Complete(CoreDriver::Success(driver_.Grant())), IsOk());  // the import
  }
  std::vector<Core::Member> Members(int count) const {
    std::vector<Core::Member> members;
    for (int i = 0; i < count; ++i) members.push_back({Join("synthesize/", i), Join("w", i), "i1"});
    return members;
  }
  StatusOr<std::vector<v1::Lease>> Grant(const std::vector<Core::Member>& members) {
    return driver_.core.GrantGang("a", members, "host.example", 4711, driver_.now, &driver_.events);
  }
  int Leased() const { return static_cast<int>(driver_.core.state().leases.size()); }

  CoreDriver driver_;
};

TEST_F(GangTest, MembersKnowTheirRankAndWhereToMeet) {
  const auto leases = Grant(Members(3));
  ASSERT_THAT(leases, IsOk());
  for (uint32_t rank = 0; rank < 3; ++rank) {
    const v1::Gang& gang = (*leases)[rank].gang();
    EXPECT_EQ(gang.rank(), rank);
    EXPECT_EQ(gang.world_size(), 3);
    EXPECT_EQ(gang.address(), "host.example");
    EXPECT_EQ(gang.port(), 4711);
    EXPECT_EQ(gang.id(), (*leases)[0].gang().id());
  }
  EXPECT_EQ(Dump(driver_.Replayed().state()), Dump(driver_.core.state()));
  Core restored(CoreDriver::WithVersion({}));
  ASSERT_THAT(restored.Restore(driver_.core.Snapshot()), IsOk());
  EXPECT_EQ(restored.state().jobs.at("a").Find("synthesize/2")->gang.rank(), 2);
}

// Goal: none is granted when one cannot be.
TEST_F(GangTest, AllOrNothing) {
  ASSERT_THAT(driver_.core.Grant("a", "synthesize/2", "w9", "i1", driver_.now, &driver_.events), IsOk());
  const size_t events = driver_.events.size();
  EXPECT_THAT(Grant(Members(4)), StatusCodeIs(absl::StatusCode::kNotFound));
  EXPECT_EQ(driver_.events.size(), events);
  EXPECT_EQ(Leased(), 1);
}

// Goal: however a member is lost, the rest is taken back, is charged nothing, and cannot commit any more.  Method: each way of losing
// the second of three, with a lone task beside them that must not be touched.
TEST_F(GangTest, LossOfAMemberFreesAll) {
  const auto alone = driver_.core.Grant("a", "synthesize/3", "w3", "i1", driver_.now, &driver_.events);
  ASSERT_THAT(alone, IsOk());
  for (const char* way : {"failed", "restarted", "silent", "preempted"}) {
    for (int s = 0; s < 120; ++s) {  // past every backoff
      driver_.Wait(1'000);
      (void)driver_.Synchronize({*alone}, "w3");
    }
    const auto leases = Grant(Members(3));
    ASSERT_THAT(leases, IsOk()) << way;
    const v1::Lease lost = (*leases)[1];
    ASSERT_EQ(Leased(), 4);
    if (way == std::string("failed")) {
      ASSERT_THAT(driver_.Complete(CoreDriver::Failure(lost, v1::INFRA)), IsOk());
    } else if (way == std::string("restarted")) {
      (void)driver_.Synchronize({}, "w1", "i2");
    } else if (way == std::string("preempted")) {
      driver_.core.Preempt("a", lost.token().path(), "make room");
      v1::CommitCheckpointRequest checkpoint;
      *checkpoint.mutable_lease() = lost.token();
      checkpoint.set_step(10);
      checkpoint.mutable_checkpoint()->set_digest(DigestOf("checkpoint"));
      ASSERT_THAT(driver_.core.CommitCheckpoint(checkpoint, driver_.now, &driver_.events), IsOk());
    } else {
      for (int s = 0; s < 40; ++s) {
        driver_.Wait(1'000);
        for (const int w : {0, 2}) (void)driver_.Synchronize({(*leases)[static_cast<size_t>(w)]}, Join("w", w));
        (void)driver_.Synchronize({*alone}, "w3");
      }
    }
    EXPECT_EQ(Leased(), 1) << way;
    EXPECT_EQ(driver_.Task("a", "synthesize/3").state, v1::Task::LEASED) << way;
    for (const int w : {0, 2}) {
      const v1::Lease& other = (*leases)[static_cast<size_t>(w)];
      const TaskState& task = driver_.Task("a", other.token().path());
      EXPECT_EQ(task.state, v1::Task::READY) << way;
      EXPECT_EQ(task.infra_failures + task.crashes + task.node_failures, 0) << way;
      EXPECT_THAT(driver_.Complete(CoreDriver::Success(other)), StatusCodeIs(absl::StatusCode::kAborted)) << way;
      EXPECT_EQ(driver_.Synchronize({other}, Join("w", w)).cancel.size(), 1) << way;
    }
  }
}

}  // namespace
}  // namespace refinery::jobs
