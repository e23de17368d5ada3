#include "server/jobs/core.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "tests/server/jobs/tiny_job.h"
#include "tests/support/status_matchers.h"

namespace refinery::jobs {
namespace {

using refinery::testing::CoreDriver;
using refinery::testing::IsOk;
using refinery::testing::IsOkAndHolds;
using refinery::testing::StatusCodeIs;
using refinery::testing::StatusIs;
using refinery::testing::TinyRecipe;
using ::testing::HasSubstr;

const auto kTrains = [](const v1::Lease& lease) { return lease.spec().has_train(); };

// Goal: a job goes through every stage and ends with the export's output and the report.
// Method: one worker that does all tasks; order and end are checked against the plan and the recipe.
TEST(CoreTest, RunsAJobToItsEnd) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOkAndHolds("a"));
  EXPECT_EQ(driver.Job("a").state, v1::Job::PENDING);
  EXPECT_EQ(driver.core.ReadyTasks(driver.now, 10).front().path, "import/student");
  driver.RunAll();

  const JobState& job = driver.Job("a");
  EXPECT_EQ(job.state, v1::Job::SUCCEEDED);
  EXPECT_EQ(job.artifact.digest(), DigestOf("export"));
  EXPECT_EQ(job.report.digest(), DigestOf("report of a"));
  EXPECT_EQ(job.settled, job.tasks.size());
  // A task is never leased before what it needs has finished.
  std::set<std::string> finished;
  for (const v1::Event& event : driver.events) {
    if (event.has_task_finished()) finished.insert(event.task_finished().path());
    if (!event.has_task_leased()) continue;
    for (const std::string& need : job.plan.Find(event.task_leased().path())->needs) EXPECT_TRUE(finished.contains(need)) << need;
  }
  for (size_t i = 0; i < driver.events.size(); ++i) EXPECT_EQ(driver.events[i].seq(), i + 1);
  EXPECT_TRUE(driver.events.back().has_job_finished());
}

// Goal: the study's best replicate feeds what comes after it.  Method: losses are fixed; trial 1, replicate 1 is the lowest.
TEST(CoreTest, BestReplicateGoesOn) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  driver.RunAll();
  const JobState& job = driver.Job("a");
  ASSERT_EQ(job.trials.size(), 2);
  EXPECT_EQ(job.trials[0].state(), v1::Trial::SUCCEEDED);
  EXPECT_DOUBLE_EQ(job.trials[0].mean(), 2.875);
  EXPECT_DOUBLE_EQ(job.trials[1].mean(), 1.875);
  EXPECT_EQ(job.best.at("best"), (std::pair<uint32_t, uint32_t>(1, 1)));
  const TaskState& quantize = *job.Find("quantize/refined");
  bool found = false;
  for (const v1::ArtifactRef& input : quantize.spec.inputs()) {
    if (input.name() != "adapter") continue;
    found = true;
    EXPECT_EQ(input.digest(), DigestOf("trial/1/replicate/1"));
  }
  EXPECT_TRUE(found);
  // The settings of the trial stand in the spec that the worker got.
  EXPECT_EQ(job.Find("trial/1/replicate/0")->spec.train().settings().learning_rate(),
            job.trials[1].settings().learning_rate());
}

// Goal: replaying the log gives the same durable state at every point of a job's life, also mid-lease.
// Method: compare the canonical dumps after each command of an eventful run.
TEST(CoreTest, ReplayGivesTheSameState) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a", "request"), IsOk());
  int step = 0;
  const auto check = [&] { ASSERT_EQ(Dump(driver.Replayed().state()), Dump(driver.core.state())) << "step " << step++; };
  driver.RunUntil([&](const v1::Lease& lease) {
    check();
    return kTrains(lease);
  });
  v1::CommitCheckpointRequest checkpoint;
  *checkpoint.mutable_lease() = driver.RunUntil(kTrains).token();
  checkpoint.set_step(10);
  checkpoint.mutable_checkpoint()->set_digest(DigestOf("checkpoint"));
  ASSERT_THAT(driver.core.CommitCheckpoint(checkpoint, driver.now, &driver.events), IsOk());
  check();
  driver.Wait(31'000);  // both leases end
  check();
  v1::Lease lease = driver.Grant();
  ASSERT_THAT(driver.Complete(CoreDriver::Failure(lease, v1::INFRA)), IsOk());
  check();
  driver.Wait(60'000);
  lease = driver.Grant();
  ASSERT_THAT(driver.Complete(CoreDriver::Failure(lease, v1::NUMERIC)), IsOk());
  check();
  driver.RunAll();
  check();
  EXPECT_EQ(driver.Job("a").state, v1::Job::SUCCEEDED);
}

// Goal: a silent worker's task goes to another one, and the late result of the first is refused.
TEST(CoreTest, ExpiredLeaseIsGrantedAgainAndTheOldOneIsStale) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  const v1::Lease first = driver.Grant("w1");
  driver.Wait(20'000);
  EXPECT_TRUE(driver.Synchronize({first}, "w1").cancel.empty());
  driver.Wait(20'000);  // renewed 20 s ago: still held
  EXPECT_EQ(driver.Task("a", "import/student").state, v1::Task::LEASED);
  driver.Wait(10'000);
  EXPECT_EQ(driver.Task("a", "import/student").state, v1::Task::READY);

  const v1::Lease second = driver.Grant("w2");
  EXPECT_EQ(second.token().path(), first.token().path());
  EXPECT_GT(second.token().epoch(), first.token().epoch());
  EXPECT_EQ(second.attempt(), 2);
  EXPECT_THAT(driver.Complete(CoreDriver::Success(first)), StatusIs(absl::StatusCode::kAborted, HasSubstr("STALE_LEASE")));
  EXPECT_EQ(driver.core.stale_commits(), 1);
  EXPECT_EQ(driver.Synchronize({first}, "w1").cancel.size(), 1);
  ASSERT_THAT(driver.Complete(CoreDriver::Success(second)), IsOk());
  EXPECT_EQ(driver.Task("a", "import/student").state, v1::Task::DONE);
}

// Goal: a worker whose messages arrive while no answer reaches it keeps its lease no longer than it believes in it itself: 30 s from
// the last call that was answered.
TEST(CoreTest, LeaseEndsAlthoughMessagesArriveWhenNoAnswerDoes) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  const v1::Lease lease = driver.Grant();
  v1::SynchronizeRequest request = CoreDriver::Running({lease});
  for (int second = 1; second < 30; ++second) {
    driver.Wait(1'000);
    request.set_unheard_ms(static_cast<uint32_t>(second * 1'000));
    const Core::Report report = driver.core.Synchronize(request, driver.now, &driver.events);
    EXPECT_EQ(report.not_renewed, second > 6) << second;
    EXPECT_EQ(driver.Task("a", "import/student").state, v1::Task::LEASED) << second;
  }
  driver.Wait(1'000);
  EXPECT_EQ(driver.Task("a", "import/student").state, v1::Task::READY);
}

// Goal: after 20 s without an answer the first one only tells the worker to call again; that call renews the lease in full.
TEST(CoreTest, LeaseIsRenewedOnceAnAnswerHasArrived) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  const v1::Lease lease = driver.Grant();
  driver.Wait(20'000);
  v1::SynchronizeRequest request = CoreDriver::Running({lease});
  request.set_unheard_ms(20'000);
  EXPECT_TRUE(driver.core.Synchronize(request, driver.now, &driver.events).not_renewed);
  request.set_unheard_ms(10);
  EXPECT_FALSE(driver.core.Synchronize(request, driver.now, &driver.events).not_renewed);
  driver.Wait(29'999);
  EXPECT_EQ(driver.Task("a", "import/student").state, v1::Task::LEASED);
  driver.Wait(1);
  EXPECT_EQ(driver.Task("a", "import/student").state, v1::Task::READY);
}

// Goal: a call whose answer was lost can be repeated; another result for the same attempt is refused.
TEST(CoreTest, CompletionIsIdempotent) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  const v1::Lease lease = driver.Grant();
  ASSERT_THAT(driver.Complete(CoreDriver::Success(lease)), IsOk());
  const size_t events = driver.events.size();
  EXPECT_THAT(driver.Complete(CoreDriver::Success(lease)), IsOk());
  EXPECT_EQ(driver.events.size(), events);
  v1::CompleteTaskRequest other = CoreDriver::Success(lease);
  other.mutable_success()->mutable_output()->set_digest(DigestOf("something else"));
  EXPECT_THAT(driver.Complete(other), StatusCodeIs(absl::StatusCode::kAborted));
}

// Goal: after a restart a running attempt is adopted when its worker reports it within one lease time, and lost otherwise.
TEST(CoreTest, RunningAttemptsAreAdoptedAfterARestart) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  const v1::Lease lease = driver.Grant();
  for (const bool reports : {true, false}) {
    Core restarted = driver.Replayed();
    Now now{.steady = std::chrono::milliseconds(5), .unix_ms = driver.now.unix_ms};  // a new process, a new steady clock
    Events events;
    restarted.StartGrace(now, &events);
    const auto wait = [&](int seconds) {
      for (; seconds > 0; --seconds) {
        now.steady += std::chrono::milliseconds(1'000);
        restarted.Tick(now, &events);
      }
    };
    wait(29);
    EXPECT_TRUE(events.empty());
    if (reports) {
      EXPECT_TRUE(restarted.Synchronize(CoreDriver::Running({lease}), now, &events).cancel.empty());
    }
    wait(2);
    EXPECT_EQ(restarted.AttemptOf(lease.token())->state, reports ? v1::Task::LEASED : v1::Task::READY);
    EXPECT_EQ(restarted.Complete(CoreDriver::Success(lease), now, &events).ok(), reports);
  }
}

// Goal: a restarted worker's tasks are free at once, not only when their lease runs out.
TEST(CoreTest, RestartedWorkerLosesItsLeasesAtOnce) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  driver.Grant("w1", "i1");
  driver.Synchronize({}, "w1", "i1");  // the same incarnation may be about to complete it
  EXPECT_EQ(driver.Task("a", "import/student").state, v1::Task::LEASED);
  driver.Synchronize({}, "w1", "i2");
  EXPECT_EQ(driver.Task("a", "import/student").state, v1::Task::READY);
}

// Goal: a diverged replicate makes its trial INFEASIBLE, which is a result: the job goes on with the other trial.
TEST(CoreTest, NumericFailureMakesTheTrialInfeasible) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  driver.RunUntil([&](const v1::Lease& lease) { return kTrains(lease); });
  const v1::Lease lease = driver.RunUntil([&](const v1::Lease& l) { return l.token().path() == "trial/1/replicate/0"; });
  ASSERT_EQ(lease.token().path(), "trial/1/replicate/0");
  ASSERT_THAT(driver.Complete(CoreDriver::Failure(lease, v1::NUMERIC, "loss is NaN in layer 3")), IsOk());
  driver.Wait(31'000);  // the first train task, which was left leased
  driver.RunAll();
  const JobState& job = driver.Job("a");
  EXPECT_EQ(job.state, v1::Job::SUCCEEDED) << job.reason;
  EXPECT_EQ(job.trials[1].state(), v1::Trial::INFEASIBLE);
  EXPECT_EQ(job.best.at("best").first, 0);
  EXPECT_EQ(job.Find("trial/1/replicate/0")->attempt, 1);
}

// Goal: a loss that is not a number counts as divergence even when the task reports success.
TEST(CoreTest, NonFiniteLossIsInfeasible) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  const v1::Lease lease = driver.RunUntil(kTrains);
  ASSERT_THAT(driver.Complete(CoreDriver::Success(lease, std::nan(""))), IsOk());
  EXPECT_TRUE(driver.Job("a").trials[0].replicates(0).infeasible());
}

// Goal: when every trial diverges there is nothing to export, and the job says why.
TEST(CoreTest, JobFailsWhenEveryTrialDiverges) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  for (;;) {
    const v1::Lease lease = driver.RunUntil(kTrains);
    if (lease.token().path().empty()) break;
    ASSERT_THAT(driver.Complete(CoreDriver::Failure(lease, v1::NUMERIC)), IsOk());
  }
  EXPECT_EQ(driver.Job("a").state, v1::Job::FAILED);
  EXPECT_THAT(driver.Job("a").reason, HasSubstr("every trial diverged"));
}

// Goal: an optimizer without a feasible trial costs its own evaluation only.  Method: both choices are searched, the trials
// of one of them diverge.
TEST(CoreTest, EvaluationOfAnOptimizerWithoutTrialsIsSkipped) {
  v1::Recipe recipe = TinyRecipe();
  v1::Parameter* parameter = recipe.mutable_search()->add_parameters();
  parameter->set_name("optimizer");
  parameter->add_choices("muon");
  parameter->add_choices("adamw");
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a", "", recipe), IsOk());
  std::string first;
  for (v1::Lease lease = driver.RunUntil(kTrains); !lease.token().path().empty(); lease = driver.RunUntil(kTrains)) {
    const std::string& optimizer = lease.spec().train().settings().optimizer();
    if (first.empty()) first = optimizer;
    ASSERT_THAT(driver.Complete(optimizer == first ? CoreDriver::Success(lease) : CoreDriver::Failure(lease, v1::NUMERIC)), IsOk());
  }
  driver.RunAll();
  const JobState& job = driver.Job("a");
  EXPECT_EQ(job.state, v1::Job::SUCCEEDED) << job.reason;
  const std::string skipped = first == "muon" ? "evaluate/best-adamw" : "evaluate/best-muon";
  EXPECT_EQ(job.Find(skipped)->epoch, 0);
  EXPECT_THAT(job.Find(skipped)->error.message(), HasSubstr("no feasible trial"));
}

struct RetryCase {
  v1::FailureClass failure_class;
  uint32_t attempts;  // that are made before the job fails
};
class RetryTest : public ::testing::TestWithParam<RetryCase> {};

// Goal: each class of failure is tried as often as server/jobs/retry.h says, then the job fails and names the task.
TEST_P(RetryTest, TriesAsOftenAsItsClassAllows) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  uint32_t attempts = 0;
  while (!IsTerminal(driver.Job("a").state) && attempts < 100) {
    const v1::Lease lease = driver.Grant();
    ASSERT_EQ(lease.token().path(), "import/student");
    ++attempts;
    ASSERT_THAT(driver.Complete(CoreDriver::Failure(lease, GetParam().failure_class, "no such file")), IsOk());
    driver.Wait(60'000);
  }
  EXPECT_EQ(attempts, GetParam().attempts);
  EXPECT_EQ(driver.Job("a").state, v1::Job::FAILED);
  EXPECT_THAT(driver.Job("a").reason, HasSubstr("import/student"));
  EXPECT_THAT(driver.Job("a").reason, HasSubstr("no such file"));
}
INSTANTIATE_TEST_SUITE_P(Classes, RetryTest,
                         ::testing::Values(RetryCase{v1::USER, 1}, RetryCase{v1::BUG, 1}, RetryCase{v1::NUMERIC, 1},
                                           RetryCase{v1::NODE, 3}, RetryCase{v1::RESOURCE, 3}, RetryCase{v1::POISON, 3},
                                           RetryCase{v1::INFRA, 21}),
                         [](const auto& info) { return v1::FailureClass_Name(info.param.failure_class); });

// Goal: a task whose attempts end without a word three times is not given to a fourth worker.
TEST(CoreTest, ThreeExpiriesPoisonATask) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  for (int i = 0; i < 3; ++i) {
    ASSERT_FALSE(driver.Grant().token().path().empty());
    driver.Wait(30'000);
  }
  EXPECT_EQ(driver.Job("a").state, v1::Job::FAILED);
  EXPECT_THAT(driver.Job("a").reason, HasSubstr("POISON"));
}

// Goal: a checkpoint is handed to the next attempt, only grows, and is proof that the task is not poison.
TEST(CoreTest, CheckpointIsCarriedToTheNextAttempt) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  v1::Lease lease = driver.RunUntil(kTrains);
  for (uint64_t step = 10; step <= 50; step += 10) {
    v1::CommitCheckpointRequest request;
    *request.mutable_lease() = lease.token();
    request.set_step(step);
    request.mutable_checkpoint()->set_digest(DigestOf(Join("step ", step)));
    ASSERT_THAT(driver.core.CommitCheckpoint(request, driver.now, &driver.events), IsOk());
    EXPECT_THAT(driver.core.CommitCheckpoint(request, driver.now, &driver.events), IsOk());  // said twice
    request.set_step(step - 5);
    EXPECT_THAT(driver.core.CommitCheckpoint(request, driver.now, &driver.events),
                StatusCodeIs(absl::StatusCode::kFailedPrecondition));
    driver.Wait(30'000);
    request.set_step(step + 5);
    EXPECT_THAT(driver.core.CommitCheckpoint(request, driver.now, &driver.events), StatusCodeIs(absl::StatusCode::kAborted));
    const v1::Lease next = driver.Grant();
    ASSERT_EQ(next.token().path(), lease.token().path());
    EXPECT_EQ(next.checkpoint_step(), step);
    EXPECT_EQ(next.checkpoint().digest(), DigestOf(Join("step ", step)));
    lease = next;
  }
  EXPECT_FALSE(IsTerminal(driver.Job("a").state));
}

// Goal: cancelling stops what runs, starts nothing new, and ends once the worker has let go.
TEST(CoreTest, CancelWaitsForTheWorkerThenEnds) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  const v1::Lease lease = driver.Grant();
  ASSERT_THAT(driver.core.CancelJob("a", "changed my mind", driver.now, &driver.events), IsOk());
  EXPECT_EQ(driver.Job("a").state, v1::Job::CANCELLING);
  EXPECT_TRUE(driver.core.ReadyTasks(driver.now, 10).empty());
  EXPECT_EQ(driver.Synchronize({lease}).cancel.size(), 1);
  EXPECT_EQ(driver.Job("a").state, v1::Job::CANCELLING);
  driver.Synchronize({});
  EXPECT_EQ(driver.Job("a").state, v1::Job::CANCELLED);
  EXPECT_EQ(driver.Job("a").reason, "changed my mind");
  EXPECT_THAT(driver.Complete(CoreDriver::Success(lease)), StatusCodeIs(absl::StatusCode::kAborted));
  const size_t events = driver.events.size();
  EXPECT_THAT(driver.core.CancelJob("a", "", driver.now, &driver.events), IsOk());
  EXPECT_EQ(driver.events.size(), events);
  EXPECT_EQ(Dump(driver.Replayed().state()), Dump(driver.core.state()));
}

// Goal: a worker that never lets go of a cancelled attempt cannot keep the job from ending.
TEST(CoreTest, CancelEndsWithTheLeaseOfASilentWorker) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  const v1::Lease lease = driver.Grant();
  ASSERT_THAT(driver.core.CancelJob("a", "", driver.now, &driver.events), IsOk());
  for (int i = 0; i < 4; ++i) {
    driver.Wait(10'000);
    driver.Synchronize({lease});
  }
  EXPECT_EQ(driver.Job("a").state, v1::Job::CANCELLED);
}

// Goal: a second job with the same recipe runs nothing but the import, whose file may have changed.
TEST(CoreTest, SecondIdenticalJobIsCached) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  driver.RunAll();
  ASSERT_THAT(driver.Create("b"), IsOk());
  const size_t before = driver.events.size();
  driver.RunAll();
  EXPECT_EQ(driver.Job("b").state, v1::Job::SUCCEEDED);
  EXPECT_EQ(driver.Job("b").artifact.digest(), driver.Job("a").artifact.digest());
  int leases = 0;
  for (size_t i = before; i < driver.events.size(); ++i) leases += driver.events[i].has_task_leased();
  EXPECT_EQ(leases, 1);
  EXPECT_EQ(driver.Task("b", "curate").state, v1::Task::CACHED);
  EXPECT_EQ(driver.Job("b").trials[1].mean(), driver.Job("a").trials[1].mean());
}

// Goal: of two tasks with the same identity one runs, and the other takes its result.
TEST(CoreTest, IdenticalTasksRunOnce) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  ASSERT_THAT(driver.Create("b"), IsOk());
  ASSERT_THAT(driver.Complete(CoreDriver::Success(driver.Grant("w1"))), IsOk());  // a's import
  const v1::Lease lease = driver.Grant("w1");
  ASSERT_EQ(lease.token().path(), "synthesize/0");
  ASSERT_THAT(driver.Complete(CoreDriver::Success(driver.Grant("w2"))), IsOk());  // b's import
  ASSERT_EQ(driver.Task("b", "synthesize/0").state, v1::Task::READY);
  EXPECT_EQ(driver.Grant("w2").token().path(), "");
  ASSERT_THAT(driver.Complete(CoreDriver::Success(lease)), IsOk());
  driver.RunAll();
  EXPECT_EQ(driver.Task("a", "synthesize/0").state, v1::Task::DONE);
  EXPECT_EQ(driver.Task("b", "synthesize/0").state, v1::Task::CACHED);
}

// Goal: a lease that ran out stays over when the task has its result from elsewhere since.  Method: the identical task of another job
// runs to its end between the end of the lease and the late result.
TEST(CoreTest, ALateResultOfACachedTaskIsStale) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  ASSERT_THAT(driver.Complete(CoreDriver::Success(driver.Grant("w1"))), IsOk());  // a's import
  const v1::Lease late = driver.Grant("w1");
  ASSERT_EQ(late.token().path(), "synthesize/0");
  driver.Wait(40'000);
  ASSERT_EQ(driver.Task("a", "synthesize/0").state, v1::Task::READY);
  ASSERT_THAT(driver.Create("b"), IsOk());
  const auto grant = [&](const std::string& path) {
    return driver.core.Grant("b", path, "w2", "i1", driver.now, &driver.events).value();
  };
  ASSERT_THAT(driver.Complete(CoreDriver::Success(grant("import/student"))), IsOk());
  ASSERT_THAT(driver.Complete(CoreDriver::Success(grant("synthesize/0"))), IsOk());
  (void)driver.core.Grant("a", "synthesize/0", "w2", "i1", driver.now, &driver.events);
  ASSERT_EQ(driver.Task("a", "synthesize/0").state, v1::Task::CACHED);
  EXPECT_THAT(driver.Complete(CoreDriver::Success(late)), StatusCodeIs(absl::StatusCode::kAborted));
}

// Goal: a cached result whose bytes are gone is made again.
TEST(CoreTest, CachedResultWithoutItsBytesIsNotUsed) {
  CoreDriver driver({.is_complete = [](const std::string& digest) { return digest != DigestOf("curate"); }});
  ASSERT_THAT(driver.Create("a"), IsOk());
  driver.RunAll();
  ASSERT_THAT(driver.Create("b"), IsOk());
  driver.RunAll();
  EXPECT_EQ(driver.Task("b", "curate").state, v1::Task::DONE);
  EXPECT_EQ(driver.Task("b", "synthesize/0").state, v1::Task::CACHED);
}

// Goal: the same request makes one job; the same id for another recipe is an error.
TEST(CoreTest, CreateJobIsIdempotentByRequestId) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a", "r1"), IsOkAndHolds("a"));
  EXPECT_THAT(driver.Create("b", "r1"), IsOkAndHolds("a"));
  EXPECT_EQ(driver.core.state().jobs.size(), 1);
  v1::Recipe other = TinyRecipe();
  other.set_seed(7);
  EXPECT_THAT(driver.Create("c", "r1", other), StatusCodeIs(absl::StatusCode::kAlreadyExists));
}

// Goal: a report that a crash swallowed is asked for again after the restart.
TEST(CoreTest, MissingReportIsAskedForAfterARestart) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  driver.RunUntil([](const v1::Lease&) { return false; });
  EXPECT_THAT(driver.core.JobsWithoutReport(), ::testing::ElementsAre("a"));
  EXPECT_THAT(driver.Replayed().JobsWithoutReport(), ::testing::ElementsAre("a"));
  driver.RunAll();
  EXPECT_TRUE(driver.Replayed().JobsWithoutReport().empty());
  v1::ArtifactRef again;
  again.set_digest(DigestOf("another report"));
  EXPECT_THAT(driver.core.WriteReport("a", again, driver.now, &driver.events), IsOk());
  EXPECT_EQ(driver.Job("a").report.digest(), DigestOf("report of a"));
}

// Goal: the same note told twice stands once in the log.
TEST(CoreTest, NotesAreTakenOnce) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  const v1::Lease lease = driver.Grant();
  v1::SynchronizeRequest request = CoreDriver::Running({lease});
  request.mutable_running(0)->add_notes()->set_code("damping_raised");
  driver.core.Synchronize(request, driver.now, &driver.events);
  driver.core.Synchronize(request, driver.now, &driver.events);
  EXPECT_EQ(driver.Job("a").notes.size(), 1);
}

TEST(CoreTest, FindsJobsByUniquePrefix) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("tiny-12"), IsOk());
  ASSERT_THAT(driver.Create("tiny-34"), IsOk());
  EXPECT_EQ((*driver.core.FindJob("tiny-1"))->id, "tiny-12");
  EXPECT_THAT(driver.core.FindJob("tiny"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("tiny-12, tiny-34")));
  EXPECT_THAT(driver.core.FindJob("x"), StatusCodeIs(absl::StatusCode::kNotFound));
}

// Goal: a log that was cut or mixed up is refused, not guessed at.
TEST(CoreTest, ReplayRefusesAnEventThatDoesNotFit) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  driver.Grant();
  Core core(CoreDriver::WithVersion({}));
  EXPECT_THAT(core.Replay(driver.events.back()), StatusCodeIs(absl::StatusCode::kDataLoss));
  ASSERT_THAT(core.Replay(driver.events[0]), IsOk());
  EXPECT_THAT(core.Replay(driver.events[0]), StatusCodeIs(absl::StatusCode::kDataLoss));
}

}  // namespace
}  // namespace refinery::jobs
