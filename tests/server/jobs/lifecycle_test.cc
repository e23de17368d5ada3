// Pause, resume, retry, kill, budgets, stalls, and leases around pauses of the coordinator.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <tuple>

#include "server/jobs/policy.h"
#include "tests/server/jobs/tiny_job.h"
#include "tests/support/status_matchers.h"

namespace refinery::jobs {
namespace {

using refinery::testing::CoreDriver;
using refinery::testing::IsOk;
using refinery::testing::StatusCodeIs;
using refinery::testing::StatusIs;
using ::testing::HasSubstr;

const auto kTrains = [](const v1::Lease& lease) { return lease.spec().has_train(); };

void ExpectReplays(const CoreDriver& driver) {
  EXPECT_EQ(Dump(driver.Replayed().state()), Dump(driver.core.state()));
  Core restored(CoreDriver::WithVersion({}));
  ASSERT_THAT(restored.Restore(driver.core.Snapshot()), IsOk());
  EXPECT_EQ(Dump(restored.state()), Dump(driver.core.state()));
  EXPECT_EQ(restored.Snapshot(), driver.core.Snapshot());
}

v1::CommitCheckpointRequest Checkpoint(const v1::Lease& lease, uint64_t step) {
  v1::CommitCheckpointRequest request;
  *request.mutable_lease() = lease.token();
  request.set_step(step);
  request.mutable_checkpoint()->set_digest(DigestOf(Join("step ", step)));
  return request;
}

// Goal: a pause takes leases back at their next checkpoint, or after the grace, charges nothing, starts nothing, and a resumed
// job ends as if nothing had been.
TEST(LifecycleTest, PauseTakesLeasesBackAndResumeGoesOn) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  const v1::Lease first = driver.RunUntil(kTrains);
  const v1::Lease second = driver.Grant("w2", "i2");
  ASSERT_TRUE(second.spec().has_train());
  ASSERT_THAT(driver.core.PauseJob("a", "lunch", driver.now, &driver.events), IsOk());
  ASSERT_THAT(driver.core.PauseJob("a", "again", driver.now, &driver.events), IsOk());
  EXPECT_EQ(driver.Job("a").state, v1::Job::PAUSED);
  EXPECT_EQ(driver.Job("a").reason, "lunch");
  EXPECT_TRUE(driver.core.ReadyTasks(driver.now, 10).empty());
  ExpectReplays(driver);

  ASSERT_THAT(driver.core.CommitCheckpoint(Checkpoint(first, 10), driver.now, &driver.events), IsOk());
  EXPECT_EQ(driver.Task("a", first.token().path()).state, v1::Task::READY);
  EXPECT_THAT(driver.core.Grant("a", first.token().path(), "w3", "i3", driver.now, &driver.events).status(),
              StatusCodeIs(absl::StatusCode::kFailedPrecondition));
  for (int i = 0; i < 7; ++i) {
    EXPECT_EQ(driver.Task("a", second.token().path()).state, i < 6 ? v1::Task::LEASED : v1::Task::READY) << i;
    driver.Synchronize({second}, "w2", "i2");
    driver.Wait(10'000);
  }
  EXPECT_EQ(driver.Synchronize({second}, "w2", "i2").cancel.size(), 1);
  const TaskState& task = driver.Task("a", second.token().path());
  EXPECT_EQ(task.crashes + task.infra_failures, 0);
  ExpectReplays(driver);

  ASSERT_THAT(driver.core.ResumeJob("a", "", driver.now, &driver.events), IsOk());
  EXPECT_EQ(driver.Job("a").paused_ms, 70'000);
  EXPECT_EQ(driver.Grant().checkpoint_step(), 10);
  driver.Wait(31'000);
  driver.RunAll();
  EXPECT_EQ(driver.Job("a").state, v1::Job::SUCCEEDED);
  EXPECT_THAT(driver.core.PauseJob("a", "", driver.now, &driver.events), StatusCodeIs(absl::StatusCode::kFailedPrecondition));
  ExpectReplays(driver);
}

TEST(LifecycleTest, KillEndsAtOnceAndRetryGoesOnWhereItEnded) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  const v1::Lease lease = driver.RunUntil(kTrains);
  ASSERT_THAT(driver.core.CommitCheckpoint(Checkpoint(lease, 10), driver.now, &driver.events), IsOk());
  ASSERT_THAT(driver.core.KillJob("a", "", driver.now, &driver.events), IsOk());
  EXPECT_EQ(driver.Job("a").state, v1::Job::CANCELLED);
  EXPECT_EQ(driver.Synchronize({lease}).cancel.size(), 1);
  EXPECT_TRUE(driver.core.state().leases.empty());
  const size_t events = driver.events.size();
  ASSERT_THAT(driver.core.KillJob("a", "", driver.now, &driver.events), IsOk());
  EXPECT_EQ(driver.events.size(), events);

  ASSERT_THAT(driver.core.RetryJob("a", "once more", driver.now, &driver.events), IsOk());
  EXPECT_EQ(driver.Job("a").state, v1::Job::RUNNING);
  EXPECT_EQ(driver.Task("a", "curate").state, v1::Task::DONE);
  const v1::Lease again = driver.Grant();
  EXPECT_EQ(again.token().path(), lease.token().path());
  EXPECT_GT(again.token().epoch(), lease.token().epoch());
  EXPECT_EQ(again.checkpoint_step(), 10);
  EXPECT_THAT(driver.Complete(CoreDriver::Success(lease)), StatusCodeIs(absl::StatusCode::kAborted));
  ExpectReplays(driver);
  ASSERT_THAT(driver.Complete(CoreDriver::Success(again)), IsOk());
  driver.RunAll();
  EXPECT_EQ(driver.Job("a").state, v1::Job::SUCCEEDED);
  EXPECT_THAT(driver.core.RetryJob("a", "", driver.now, &driver.events), StatusCodeIs(absl::StatusCode::kFailedPrecondition));
}

TEST(LifecycleTest, RetryGivesADeadTaskNewAttempts) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  ASSERT_THAT(driver.Complete(CoreDriver::Failure(driver.Grant(), v1::USER, "no such model")), IsOk());
  ASSERT_EQ(driver.Job("a").state, v1::Job::FAILED);
  ASSERT_THAT(driver.core.RetryJob("a", "", driver.now, &driver.events), IsOk());
  ExpectReplays(driver);
  driver.RunAll();
  EXPECT_EQ(driver.Job("a").state, v1::Job::SUCCEEDED);
  EXPECT_EQ(driver.Task("a", "import/student").attempt, 2);
}

// Goal: a cancelled job keeps the best adapter that it has.
TEST(LifecycleTest, CancelKeepsTheBestSoFar) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  driver.RunUntil([](const v1::Lease& lease) { return lease.token().path().starts_with("merge/"); });
  ASSERT_THAT(driver.core.KillJob("a", "", driver.now, &driver.events), IsOk());
  EXPECT_EQ(driver.Job("a").best_artifact.digest(), DigestOf("trial/1/replicate/1"));
  ExpectReplays(driver);
}

// Goal: when the budget is used up the search ends with the best so far and the job still delivers.
TEST(LifecycleTest, ExhaustedBudgetEndsTheSearchNotTheJob) {
  CoreDriver driver;
  Core::NewJob job{.id = "a"};
  *job.created.mutable_recipe() = refinery::testing::TinyRecipe();
  for (const std::string& role : refinery::testing::TinyFileRoles()) (*job.created.mutable_files())[role] = DigestOf(role);
  job.created.mutable_policy()->mutable_budget()->set_trials(1);
  ASSERT_THAT(driver.core.CreateJob(job, driver.now, &driver.events), IsOk());
  driver.RunAll();
  const JobState& state = driver.Job("a");
  EXPECT_EQ(state.state, v1::Job::SUCCEEDED) << state.reason;
  EXPECT_THAT(state.exhausted, HasSubstr("trials: 1 of 1"));
  EXPECT_EQ(state.best.at("best").first, 0);
  EXPECT_EQ(state.trials[1].state(), v1::Trial::STOPPED_EARLY);
  EXPECT_EQ(state.Find("trial/1/replicate/0")->state, v1::Task::CANCELLED);
  EXPECT_EQ(state.artifact.digest(), DigestOf("export"));
  ExpectReplays(driver);
}

TEST(LifecycleTest, WallTimeCountsAgainstTheBudgetButNotWhilePaused) {
  CoreDriver driver;
  Core::NewJob job{.id = "a"};
  *job.created.mutable_recipe() = refinery::testing::TinyRecipe();
  for (const std::string& role : refinery::testing::TinyFileRoles()) (*job.created.mutable_files())[role] = DigestOf(role);
  job.created.mutable_policy()->mutable_budget()->set_wall_ms(60'000);
  ASSERT_THAT(driver.core.CreateJob(job, driver.now, &driver.events), IsOk());
  ASSERT_THAT(driver.core.PauseJob("a", "", driver.now, &driver.events), IsOk());
  driver.Wait(100'000);
  ASSERT_THAT(driver.core.ResumeJob("a", "", driver.now, &driver.events), IsOk());
  driver.Wait(50'000);
  EXPECT_EQ(driver.Job("a").exhausted, "");
  driver.Wait(20'000);
  EXPECT_THAT(driver.Job("a").exhausted, HasSubstr("wall time"));
}

// Goal: leases outlive a coordinator that stood still for longer than they last, because nobody could renew them.
TEST(LifecycleTest, APauseOfTheCoordinatorCostsNoLease) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  const v1::Lease lease = driver.Grant();
  driver.Wait(10'000);
  driver.now.steady += std::chrono::milliseconds(300'000);
  driver.core.Tick(driver.now, &driver.events);
  EXPECT_EQ(driver.Task("a", "import/student").state, v1::Task::LEASED);
  driver.Wait(19'000);  // it had 20 s left
  EXPECT_EQ(driver.Task("a", "import/student").state, v1::Task::LEASED);
  driver.Wait(2'000);
  EXPECT_EQ(driver.Task("a", "import/student").state, v1::Task::READY);
}

// Goal: an attempt that its living worker no longer runs is free long before its lease is over, and the task is not blamed.
TEST(LifecycleTest, DroppedAttemptIsReleasedSoonAndNotBlamed) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  driver.Grant();
  for (int i = 0; i < 12; ++i) {
    driver.Synchronize({});
    driver.Wait(1'000);
  }
  const TaskState& task = driver.Task("a", "import/student");
  EXPECT_EQ(task.state, v1::Task::READY);
  EXPECT_EQ(task.crashes, 0);
  EXPECT_EQ(task.infra_failures, 1);
}

// Goal: a message of a worker's earlier life that arrives late does not cost the new life its lease.
TEST(LifecycleTest, LateMessageOfAnEarlierLifeIsIgnored) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  driver.Synchronize({}, "w1", "old");
  driver.Synchronize({}, "w1", "new");
  driver.Grant("w1", "new");
  driver.Synchronize({}, "w1", "old");
  EXPECT_EQ(driver.Task("a", "import/student").state, v1::Task::LEASED);
}

// Goal: an attempt that moved and then stands still is given up; one that moves slowly but steadily is not.
TEST(LifecycleTest, StalledAttemptIsGivenUp) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  const v1::Lease lease = driver.Grant();
  v1::SynchronizeRequest request = CoreDriver::Running({lease});
  request.mutable_running(0)->mutable_progress()->set_phase("reading");
  const auto run = [&](int seconds, int step) {
    for (int i = 0; i < seconds; ++i) {
      if (step > 0 && i % step == 0) request.mutable_running(0)->mutable_progress()->set_done(request.running(0).progress().done() + 1);
      driver.core.Synchronize(request, driver.now, &driver.events);
      driver.Wait(1'000);
    }
  };
  run(600, 100);
  EXPECT_EQ(driver.Task("a", "import/student").state, v1::Task::LEASED);
  run(890, 0);  // ten times its slowest step, less what it stood already
  EXPECT_EQ(driver.Task("a", "import/student").state, v1::Task::LEASED);
  run(30, 0);
  EXPECT_EQ(driver.Task("a", "import/student").state, v1::Task::READY);
  EXPECT_THAT(driver.events.back().lease_expired().reason(), HasSubstr("no progress in 'reading'"));
}

// Goal: who waits with a finished result for the coordinator's disk is not given up, and has its time when there is room again; who
// stands still then is.
TEST(LifecycleTest, AttemptsDoNotStallWhileTheDiskIsFull) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  const v1::Lease lease = driver.Grant();
  v1::SynchronizeRequest request = CoreDriver::Running({lease});
  request.mutable_running(0)->mutable_progress()->set_phase("uploading outputs");
  const auto run = [&](int seconds) {
    for (int i = 0; i < seconds; ++i) {
      driver.core.Synchronize(request, driver.now, &driver.events);
      driver.Wait(1'000);
    }
  };
  run(3'000);
  for (int i = 0; i < 3; ++i) {  // said once a second; saying it again changes nothing
    driver.core.HoldStalls(true, driver.now);
    run(3'000);
  }
  driver.core.HoldStalls(false, driver.now);
  run(590);  // of the hour for a phase that has not moved yet
  EXPECT_EQ(driver.Task("a", "import/student").state, v1::Task::LEASED);
  EXPECT_EQ(driver.Task("a", "import/student").crashes, 0);
  run(30);
  EXPECT_EQ(driver.Task("a", "import/student").state, v1::Task::READY);
  EXPECT_THAT(driver.events.back().lease_expired().reason(), HasSubstr("no progress in 'uploading outputs'"));
}

// Goal: a long message is cut between two characters, so that the log can be read again.
TEST(LifecycleTest, LongMessagesStayReadable) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  std::string message(limits::kMaxErrorBytes - 1, 'x');
  message += "\xC3\xA9 and more";
  ASSERT_THAT(driver.Complete(CoreDriver::Failure(driver.Grant(), v1::INFRA, message)), IsOk());
  EXPECT_EQ(driver.Task("a", "import/student").error.message(), std::string(limits::kMaxErrorBytes - 1, 'x'));
  ExpectReplays(driver);
}

TEST(LifecycleTest, RequirementsAreBounded) {
  const auto check = [](const std::function<void(v1::Requirements*)>& set) {
    v1::JobPolicy policy;
    set(&(*policy.mutable_by_kind())["train"]);
    return CheckPolicy(policy);
  };
  constexpr uint64_t kMost = uint64_t{1} << 50;
  const std::tuple<std::string, uint64_t, std::function<void(v1::Requirements*, uint64_t)>> fields[] = {
      {"gang", 4096, [](v1::Requirements* needs, uint64_t value) { needs->set_gang(static_cast<uint32_t>(value)); }},
      {"devices", 4096, [](v1::Requirements* needs, uint64_t value) { needs->set_devices(static_cast<uint32_t>(value)); }},
      {"device_memory_bytes", kMost, [](v1::Requirements* needs, uint64_t value) { needs->set_device_memory_bytes(value); }},
      {"memory_bytes", kMost, [](v1::Requirements* needs, uint64_t value) { needs->set_memory_bytes(value); }},
      {"disk_bytes", kMost, [](v1::Requirements* needs, uint64_t value) { needs->set_disk_bytes(value); }},
  };
  for (const auto& [name, most, set] : fields) {
    EXPECT_THAT(check([&, &set = set, most = most](v1::Requirements* needs) { set(needs, most); }), IsOk()) << name;
    EXPECT_THAT(check([&, &set = set, most = most](v1::Requirements* needs) { set(needs, most + 1); }),
                StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(Join("policy.by_kind.train.", name, " is ", most + 1))));
  }
}

TEST(LifecycleTest, QuotasAndPoliciesAreChecked) {
  CoreDriver driver;
  v1::TenantPolicy tenant;
  tenant.set_tenant("default");
  tenant.set_max_jobs(1);
  ASSERT_THAT(driver.core.SetTenant(tenant, driver.now, &driver.events), IsOk());
  ASSERT_THAT(driver.Create("a"), IsOk());
  EXPECT_THAT(driver.Create("b"), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("tenant default has 1 jobs")));
  v1::JobPolicy policy;
  policy.set_priority(2000);
  EXPECT_THAT(driver.core.SetPolicy("a", policy, driver.now, &driver.events),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("policy.priority")));
  policy.set_priority(7);
  ASSERT_THAT(driver.core.SetPolicy("a", policy, driver.now, &driver.events), IsOk());
  EXPECT_EQ(driver.core.state().queues.begin()->first, 7);
  EXPECT_EQ(driver.core.state().queues.size(), 1);
  (*policy.mutable_by_kind())["training"].set_devices(1);
  EXPECT_THAT(driver.core.SetPolicy("a", policy, driver.now, &driver.events),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("training")));
  ExpectReplays(driver);
}

}  // namespace
}  // namespace refinery::jobs
