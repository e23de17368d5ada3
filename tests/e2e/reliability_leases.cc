// Leases: a coordinator that goes away, workers that are lost, commits that come too late.

#include <signal.h>

#include "common/grpc_status.h"
#include "tests/e2e/reliability.h"
#include "tests/server/api/fake_worker.h"
#include "tests/support/fault_proxy.h"

namespace refinery::reliability {
namespace {

using testing::FaultProxy;

std::vector<std::string> TtlFlags(const Settings& settings) {
  return {"--lease-ttl-ms", Join(settings.lease_ttl.count())};
}

bool IsLeased(const v1::Task& task) { return task.state() == v1::Task::LEASED; }
bool IsDone(const v1::Task& task) { return task.state() == v1::Task::DONE; }

enum class Fault { kKilled, kStopped, kCutOff, kHalfOpen, kConnectionsRefused };

// One worker with a task is lost in the way of `fault`; seconds until another one has the task.
StatusOr<double> SecondsToNextLease(const Settings& settings, Fault fault, const std::string& name) {
  const std::filesystem::path folder = settings.folder / name;
  Coordinator coordinator({.state = folder / "state", .flags = TtlFlags(settings)});
  const auto channel = coordinator.Connect();
  FaultProxy proxy(coordinator.port());
  RF_ASSIGN_OR_RETURN(const std::string job, Submit(channel, Recipe("sleep:600", 1, 1), name));
  const auto first = StartWorker(proxy.address(), folder / "first", "first", 1);
  RF_RETURN_IF_ERROR(Await(channel, job, "import/student", IsLeased, 20).status());
  const auto second = StartWorker(coordinator.address(), folder / "second", "second", 1);
  Sleep(1);  // it polls, and the first one has renewed

  const Clock::time_point start = Clock::now();
  switch (fault) {
    case Fault::kKilled: first->Signal(SIGKILL); break;
    case Fault::kStopped: kill(first->pid(), SIGSTOP); break;
    case Fault::kCutOff: proxy.set_mode(FaultProxy::Mode::kBlackhole); break;
    case Fault::kHalfOpen: proxy.set_mode(FaultProxy::Mode::kHalfOpen); break;
    case Fault::kConnectionsRefused:
      proxy.set_mode(FaultProxy::Mode::kRefuse);
      proxy.Cut();
      break;
  }
  const double limit = static_cast<double>(settings.lease_ttl.count()) / 1000 + 30;
  RF_RETURN_IF_ERROR(Await(channel, job, "import/student", [](const v1::Task& task) {
    return IsLeased(task) && task.worker() == "second";
  }, limit).status());
  const double seconds = SecondsSince(start);
  // The first one comes back and must not take anything away from the second.
  if (fault == Fault::kStopped) kill(first->pid(), SIGCONT);
  proxy.set_mode(FaultProxy::Mode::kPass);
  Sleep(1.5);
  RF_ASSIGN_OR_RETURN(const v1::Task after, Await(channel, job, "import/student", IsLeased, 1));
  if (after.worker() != "second") {
    return Internal("the lost worker's return changed the task: ", after.ShortDebugString());
  }
  return seconds;
}

}  // namespace

// Goal: a coordinator that is away for less than a lease costs no attempt.  Method: two tasks sleep over its absence (SIGKILL, later
// a new process on the same address), two end in its middle and have to upload; each must end in its first attempt.
void Away(const Settings& settings, Checks& checks) {
  constexpr int kTasks = 4;
  const std::filesystem::path folder = settings.folder / "away";
  // In the quick form longer than elsewhere: on a busy machine the restart alone may take some seconds.
  const Milliseconds ttl = std::max(settings.lease_ttl, Milliseconds(20'000));
  Coordinator coordinator({.state = folder / "state", .flags = {"--lease-ttl-ms", Join(ttl.count())}});
  const auto channel = coordinator.Connect();
  const double task_seconds = settings.away_seconds * 1.5 + 2;
  std::vector<std::string> jobs;
  for (int i = 0; i < kTasks; ++i) {
    const auto job = Submit(channel, Recipe(Join("sleep:", i % 2 == 0 ? task_seconds : settings.away_seconds / 2), 1, i), Join("away-", i));
    if (!job.ok()) return checks.Row("away: " + Message(job.status()), 0, "", "", false);
    jobs.push_back(*job);
  }
  const auto worker = StartWorker(coordinator.address(), folder / "worker", "w", kTasks);
  for (const std::string& job : jobs) (void)Await(channel, job, "import/student", IsLeased, 20);
  coordinator.Kill();
  Sleep(settings.away_seconds);
  coordinator.Start();
  int restarted = 0, done = 0;
  for (const std::string& job : jobs) {
    const auto task = Await(channel, job, "import/student", IsDone, task_seconds + 60);
    if (!task.ok()) continue;
    ++done;
    restarted += task->attempt() > 1;
  }
  checks.Row(Join("coordinator away ", settings.away_seconds, " s: attempts that were started again"), restarted, "", "= 0",
             restarted == 0 && done == kTasks);
}

// Goal: a lost worker's task is leased again within a lease's life and five seconds.
void LostWorkers(const Settings& settings, Checks& checks) {
  const double bound = static_cast<double>(settings.lease_ttl.count()) / 1000 + 5;
  const std::vector<std::pair<Fault, std::string>> faults = {{Fault::kKilled, "killed"},
                                                             {Fault::kStopped, "stopped"},
                                                             {Fault::kCutOff, "cut_off"},
                                                             {Fault::kHalfOpen, "half_open"},
                                                             {Fault::kConnectionsRefused, "connections_refused"}};
  std::vector<std::thread> threads;  // they mostly wait
  for (const auto& fault : faults) {
    threads.emplace_back([&, fault] {
      const auto seconds = SecondsToNextLease(settings, fault.first, fault.second);
      const std::string name = Join("worker ", fault.second, ": its task is leased again after");
      if (!seconds.ok()) return checks.Row(name + ": " + Message(seconds.status()), 0, "s", "", false);
      checks.Row(name, *seconds, "s", Join("<= ", bound), *seconds <= bound);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// Goal: a bad network costs time, never work or a bit.  Method: a whole job through the real agent, whose connection is slow and cut
// again and again in the middle of whatever it does; the outputs must be those of an undisturbed run.
void BadNetwork(const Settings& settings, Checks& checks) {
  const auto run = [&](const char* name, bool disturbed) -> StatusOr<v1::Job> {
    const std::filesystem::path folder = settings.folder / name;
    Coordinator coordinator({.state = folder / "state", .flags = {"--lease-ttl-ms", "10000"}});
    const auto channel = coordinator.Connect();
    FaultProxy proxy(coordinator.port());
    if (disturbed) proxy.set_mode(FaultProxy::Mode::kDelay, Milliseconds(5));
    const auto worker = StartWorker(proxy.address(), folder / "worker", "w", 2);
    RF_ASSIGN_OR_RETURN(const std::string job, Submit(channel, Recipe("succeed", 8, 1), "network"));
    const Clock::time_point start = Clock::now();
    for (int i = 1; SecondsSince(start) < 180; ++i) {
      RF_ASSIGN_OR_RETURN(v1::Job now, Describe(channel, job));
      if (now.state() >= v1::Job::SUCCEEDED) return now;
      Sleep(0.3);
      if (disturbed && i % 5 == 0) proxy.Cut();
    }
    return absl::DeadlineExceededError("the job did not end");
  };
  const auto wanted = run("network_good", false);
  const auto found = run("network_bad", true);
  const bool ok = wanted.ok() && found.ok() && wanted->state() == v1::Job::SUCCEEDED && found->state() == v1::Job::SUCCEEDED;
  const bool same = ok && OutputsOf(*wanted) == OutputsOf(*found);
  const std::string why = same ? "" : ok ? ": another end" : Join(": ", Message(wanted.status()), " ", Message(found.status()),
                                                                  wanted.ok() ? wanted->reason() : "", found.ok() ? found->reason() : "");
  checks.Row("slow and cut connections: the job ends as an undisturbed one" + why, same, "", "= 1", same);
}

// Goal: whoever has lost a lease commits nothing.  Method: one worker takes leases and falls silent, another takes the tasks over;
// the first one then tries to commit a checkpoint and a result for each, before and after the second has completed it.
void StaleCommits(const Settings& settings, Checks& checks) {
  constexpr int kTasks = 40;
  Coordinator coordinator({.state = settings.folder / "stale", .flags = {"--lease-ttl-ms", "500"}});
  const auto channel = coordinator.Connect();
  const auto fail = [&](const Status& status) { checks.Row("late commits: " + Message(status), 0, "", "", false); };
  const auto job = Submit(channel, Recipe("x", kTasks, 1), "stale");
  if (!job.ok()) return fail(job.status());
  testing::FakeWorker slow(channel, "slow"), fast(channel, "fast");
  const auto import = slow.Next();
  if (!import.ok()) return fail(import.status());
  if (const Status status = slow.Run(*import); !status.ok()) return fail(status);
  const auto old = slow.Synchronize(slow.Request({}, kTasks));
  if (!old.ok() || old->grants_size() != kTasks) return fail(Internal("the first worker got no ", kTasks, " leases"));
  const auto stub = v1::WorkerService::NewStub(channel);
  int refused = 0, tried = 0;
  const auto try_late = [&](const v1::Lease& lease) {
    const auto request = slow.MakeSuccess(lease);
    if (!request.ok()) return;
    tried += 2;
    refused += absl::IsAborted(slow.Complete(*request));
    v1::CommitCheckpointRequest checkpoint;
    *checkpoint.mutable_lease() = lease.token();
    checkpoint.set_step(7);
    *checkpoint.mutable_checkpoint() = request->success().output();
    v1::CommitCheckpointResponse response;
    grpc::ClientContext context;
    refused += absl::IsAborted(FromGrpc(stub->CommitCheckpoint(&context, checkpoint, &response)));
  };
  int taken_over = 0;
  const Clock::time_point start = Clock::now();
  while (taken_over < kTasks && SecondsSince(start) < 30) {
    const auto lease = fast.Next(1'500);
    if (!lease.ok() || lease->token().job().empty()) continue;
    ++taken_over;
    const auto stale = std::find_if(old->grants().begin(), old->grants().end(), [&](const v1::Lease& other) {
      return other.token().path() == lease->token().path();
    });
    if (stale == old->grants().end()) continue;
    try_late(*stale);
    if (const Status status = fast.Run(*lease); !status.ok()) return fail(status);
    try_late(*stale);
  }
  checks.Row("commits of lost leases that were refused", tried == 0 ? 0 : 100.0 * refused / tried, "%", "= 100",
             tried == 4 * kTasks && refused == tried);
}

}  // namespace refinery::reliability
