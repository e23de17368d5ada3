// A network that is really cut: coordinator and worker each in a network namespace of its own, between them a pair of virtual
// Ethernet devices whose link goes down. Unlike the proxy of reliability_leases.cc nothing answers for the other side: packets are
// lost, addresses are unreachable, connections hang until somebody gives them up.

#include <signal.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <fstream>

#include <absl/strings/str_join.h>

#include "common/files.h"
#include "tests/e2e/reliability.h"

namespace refinery::reliability {
namespace {

namespace fs = std::filesystem;

constexpr char kCoordinatorHost[] = "10.213.7.1", kWorkerHost[] = "10.213.7.2";

// Runs a shell script with util-linux and iproute2 in reach; an error with what it said.
Status Shell(const fs::path& log, const std::string& script) {
  const std::string whole = "set -e; PATH=$PATH:/usr/sbin:/sbin; " + script;
  RF_ASSIGN_OR_RETURN(const auto shell, Process::Start({.command = {"/bin/sh", "-c", whole}, .pipes = false, .log = log}));
  if (const ExitInfo info = shell->Wait(); info.code != 0 || info.signal != 0) {
    return FailedPrecondition("'", script, "' failed: ", ReadFile(log).value_or(""));
  }
  return absl::OkStatus();
}

// The other side: a namespace that a sleeping process holds open, and a cable to it.
class Cable {
 public:
  // FAILED_PRECONDITION where the system allows no such thing.
  static StatusOr<std::unique_ptr<Cable>> Lay(const fs::path& folder) {
    std::unique_ptr<Cable> cable(new Cable(folder / "network.log"));
    RF_ASSIGN_OR_RETURN(cable->holder_, Process::Start({.command = {"/usr/bin/env", "unshare", "--net", "sleep", "900"}, .pipes = false,
                                                        .log = cable->log_}));
    const std::string pid = Join(cable->holder_->pid());
    const auto namespace_of = [](const std::string& process) {
      std::error_code error;
      return fs::read_symlink("/proc/" + process + "/ns/net", error).string();
    };
    for (const Clock::time_point start = Clock::now(); namespace_of(pid) == namespace_of("self"); Sleep(0.01)) {
      if (SecondsSince(start) > 5 || cable->holder_->Ended()) return FailedPrecondition("no second namespace");
    }
    RF_RETURN_IF_ERROR(Shell(cable->log_, Join("ip link set lo up; ip link add name rf0 type veth peer name rf1; ",
                                               "ip link set rf1 netns ", pid, "; ip address add ", kCoordinatorHost, "/24 dev rf0; ",
                                               "ip link set rf0 up; nsenter --target ", pid, " --net sh -c 'ip link set lo up; ",
                                               "ip address add ", kWorkerHost, "/24 dev rf1; ip link set rf1 up'")));
    return cable;
  }
  // What starts a program on the other side.
  std::vector<std::string> Prefix() const {
    return {"/usr/bin/env", "nsenter", "--target", Join(holder_->pid()), "--net", "--"};
  }
  Status SetLink(bool is_up) const { return Shell(log_, is_up ? "ip link set rf0 up" : "ip link set rf0 down"); }

 private:
  explicit Cable(fs::path log) : log_(std::move(log)) {}
  const fs::path log_;
  std::unique_ptr<Process> holder_;
};

// What the cut is measured with; the times follow from the lease's life.
struct Plan {
  double ttl = 0;            // seconds
  double task_seconds = 0;   // outlives the cut and the way back
  double comeback = 0;       // bound: from the mended link to the next lease
};

v1::Recipe LongRecipe(const Plan& plan) { return Recipe(Join("sleep:", plan.task_seconds), 8, 1); }

StatusOr<v1::Job> AwaitEnd(const std::shared_ptr<grpc::Channel>& channel, const std::string& job, double limit) {
  for (const Clock::time_point start = Clock::now(); SecondsSince(start) < limit; Sleep(0.1)) {
    RF_ASSIGN_OR_RETURN(v1::Job now, Describe(channel, job));
    if (now.state() >= v1::Job::SUCCEEDED) return now;
  }
  return absl::DeadlineExceededError(Join("job ", job, " did not end"));
}

// The outputs of the same job with nothing wrong.
StatusOr<v1::Job> Undisturbed(const Settings& settings, const Plan& plan) {
  const fs::path folder = settings.folder / "partition_none";
  Coordinator coordinator({.state = folder / "state"});
  const auto channel = coordinator.Connect();
  const auto worker = StartWorker(coordinator.address(), folder / "worker", "w", 2);
  RF_ASSIGN_OR_RETURN(const std::string job, Submit(channel, LongRecipe(plan), "whole"));
  return AwaitEnd(channel, job, plan.task_seconds + 60);
}

bool IsRunning(const fs::path& pid_file) {
  pid_t pid = 0;
  std::ifstream(pid_file) >> pid;
  return pid > 0 && kill(pid, 0) == 0;
}

// The far worker has the task, the link goes down for longer than its lease, the near one takes over, the link comes back.
StatusOr<v1::Job> Disturbed(const Settings& settings, const Plan& plan, const Cable& cable, Checks& checks) {
  const fs::path folder = settings.folder / "partition";
  Coordinator coordinator({.state = folder / "state", .listen = "0.0.0.0:0",  // we reach it while the link is down
                           .flags = {"--lease-ttl-ms", Join(settings.lease_ttl.count()), "--insecure-listen-anywhere"}});
  const auto channel = coordinator.Connect();
  const auto far = StartWorker(Join(kCoordinatorHost, ":", coordinator.port()), folder / "far", "far", 1, cable.Prefix());
  RF_ASSIGN_OR_RETURN(const std::string job, Submit(channel, LongRecipe(plan), "cut"));
  const auto is_leased_to = [](const char* worker) {
    return [worker](const v1::Task& task) { return task.state() == v1::Task::LEASED && task.worker() == worker; };
  };
  RF_RETURN_IF_ERROR(Await(channel, job, "import/student", is_leased_to("far"), 20).status());
  const fs::path pid_file = folder / "far" / "sleeping.pid";
  for (const Clock::time_point start = Clock::now(); !IsRunning(pid_file); Sleep(0.02)) {
    if (SecondsSince(start) > 10) return Internal("the far worker does not run its task");
  }
  const auto near = StartWorker(Join("127.0.0.1:", coordinator.port()), folder / "near", "near", 1);
  Sleep(1);  // it polls, and the far one has renewed

  RF_RETURN_IF_ERROR(cable.SetLink(false));
  Clock::time_point start = Clock::now();
  RF_RETURN_IF_ERROR(Await(channel, job, "import/student", is_leased_to("near"), plan.ttl + 30).status());
  const double seconds = SecondsSince(start);
  const bool old_runs = IsRunning(pid_file);
  checks.Row("link down between namespaces: the task is leased again after", seconds, "s", Join("<= ", plan.ttl + 5),
             seconds <= plan.ttl + 5);
  checks.Row("link down: attempts of the old lease that still run then", old_runs, "", "= 0", !old_runs);

  Sleep(plan.ttl / 2);
  RF_ASSIGN_OR_RETURN(const std::string other, Submit(channel, Recipe("succeed", 2, 2), "after"));  // the near one is taken
  RF_RETURN_IF_ERROR(cable.SetLink(true));
  start = Clock::now();
  const auto returned = [](const v1::Task& task) { return task.worker() == "far"; };
  RF_RETURN_IF_ERROR(Await(channel, other, "import/student", returned, plan.comeback + 10).status());
  const double back = SecondsSince(start);
  checks.Row("link up again: the worker has its next lease after", back, "s", Join("<= ", plan.comeback), back <= plan.comeback);
  RF_ASSIGN_OR_RETURN(const v1::Task task, Await(channel, job, "import/student", is_leased_to("near"), 1));
  if (task.attempt() != 2) return Internal("the returned worker changed the task: ", task.ShortDebugString());
  return AwaitEnd(channel, job, plan.task_seconds + 60);
}

void PartitionInside(const Settings& settings, Checks& checks) {
  const auto cable = Cable::Lay(settings.folder);
  if (!cable.ok()) return checks.Skip("a link that goes down between namespaces", Message(cable.status()));
  const double ttl = static_cast<double>(settings.lease_ttl.count()) / 1000;
  const Plan plan{.ttl = ttl, .task_seconds = 1.5 * ttl + 12, .comeback = ttl + 5};
  StatusOr<v1::Job> wanted = absl::UnknownError("");
  std::thread whole([&] { wanted = Undisturbed(settings, plan); });
  const StatusOr<v1::Job> found = Disturbed(settings, plan, **cable, checks);
  whole.join();
  const bool ok = wanted.ok() && found.ok() && wanted->state() == v1::Job::SUCCEEDED && found->state() == v1::Job::SUCCEEDED;
  const bool same = ok && OutputsOf(*wanted) == OutputsOf(*found);
  const std::string why = same ? "" : ok ? ": another end" : Join(": ", Message(wanted.status()), " ", Message(found.status()));
  checks.Row("link down for 1.5 leases: the job ends as an undisturbed one" + why, same, "", "= 1", same);
}

}  // namespace

// Goal: a worker that cannot be reached loses its task in time, stops it in time, and comes back.  Method: this program again, alone
// in a namespace with the coordinator; the worker behind a cable to another one. Our own namespace stays as it is.
void Partition(const Settings& settings, Checks& checks) {
  if (settings.inside_namespace) return PartitionInside(settings, checks);
  std::vector<std::string> command = {"/usr/bin/env", "unshare", "--net"};
  if (geteuid() != 0) command.push_back("--map-root-user");  // where users may have namespaces
  const fs::path log = settings.folder / "partition.log";
  if (const Status status = Shell(log, "command -v ip nsenter; " + absl::StrJoin(command, " ") + " true"); !status.ok()) {
    return checks.Skip("a link that goes down between namespaces", "network namespaces are not permitted, or iproute2 is missing");
  }
  command.insert(command.end(), {(ProgramFolder() / "refinery_reliability").string(), "--inside-namespace", "partition"});
  if (settings.full) command.push_back("--full");
  const fs::path rows = settings.folder / "partition_rows.log";
  const auto inside = Process::Start({.command = command, .pipes = false, .log = rows});
  const ExitInfo info = inside.ok() ? (*inside)->Wait() : ExitInfo{.code = 1};
  checks.Relay(ReadFile(rows).value_or(""), info.code == 0 && info.signal == 0);
}

}  // namespace refinery::reliability
