// The coordinator's figures against their bounds, on a real refineryd over loopback gRPC with its state on disk:
//
//   completions   durable task completions per second (leases granted on the way; SQLite, synchronous=FULL)
//   grants        time from an idle worker's question to its lease, 1,000 workers, 50,000 ready tasks
//   restart       from the start of the process to its first answer, 104,000 tasks and 1,000,000 events, as far from the last
//                 snapshot as it gets; after a clean stop and after kill -9
//   watch         500 watchers of one job, one of which reads 1 kB/s: memory, events, and the slow one's resume
//
//   refinery_coordinator_benchmark [--folder DIR] [NAME...]     (make bench-coordinator)
//
// Prints a row per figure and exits 1 when one misses its bound.

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "common/temporary_folder.h"
#include "common/grpc_status.h"
#include "tests/bench/coordinator_fleet.h"
#include "tests/bench/coordinator_load.h"

namespace refinery::bench {
namespace {

constexpr uint32_t kJobs = 13;
constexpr uint32_t kShards = 4'000;  // of each job: 52,000 tasks ready at once

struct Row {
  std::string name;
  double value = 0;
  const char* unit = "";
  const char* bound = "";  // as text; "" when the row only informs
  bool ok = true;
};

class Benchmark {
 public:
  explicit Benchmark(std::filesystem::path folder) : folder_(std::move(folder)) {}

  void Completions();
  void Grants();
  void Restart();
  void Watch();
  bool ok() const { return ok_; }

 private:
  void Print(const Row& row) {
    std::printf("%-44s %12.2f %-6s %-14s %s\n", row.name.c_str(), row.value, row.unit, row.bound, row.ok ? "ok" : "MISSED");
    std::fflush(stdout);
    ok_ &= row.ok;
  }

  const std::filesystem::path folder_;
  bool ok_ = true;
};

using Workers = std::vector<std::unique_ptr<SimulatedWorker>>;

void Sleep(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

void Benchmark::Completions() {
  Daemon daemon(folder_ / "completions");
  const std::string output = UploadOutput(daemon.Connect());
  SubmitJobs(daemon, kJobs, kShards, output);
  FleetCounts counts;
  Workers workers;
  for (int i = 0; i < 32; ++i) {
    workers.push_back(std::make_unique<SimulatedWorker>(SimulatedWorker::Options{
        .channel = daemon.Connect(), .id = Join("w", i), .output = output, .slots = 32, .counts = &counts}));
  }
  for (const auto& worker : workers) worker->Start();
  Sleep(1);
  const uint64_t before = counts.completed;
  const double cpu = daemon.CpuSeconds();
  const Clock::time_point start = Clock::now();
  Sleep(6);
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  const double rate = static_cast<double>(counts.completed - before) / seconds;
  const double cores = (daemon.CpuSeconds() - cpu) / seconds;
  counts.stopping = true;
  daemon.Kill();
  counts.WaitForCalls();
  Print({"durable completions", rate, "1/s", ">= 5000", rate >= 5000});
  Print({"  cores that the coordinator used", cores, ""});
}

void Benchmark::Grants() {
  Daemon daemon(folder_ / "grants");
  const std::string output = UploadOutput(daemon.Connect());
  SubmitJobs(daemon, kJobs, kShards, output);
  FleetCounts counts;
  Workers workers;
  Timer timer;  // goes before the workers that it calls
  for (int i = 0; i < 1000; ++i) {
    workers.push_back(std::make_unique<SimulatedWorker>(SimulatedWorker::Options{.channel = daemon.Connect(),
                                                                                 .id = Join("w", 1000 + i),
                                                                                 .output = output,
                                                                                 .mean_seconds = 5,
                                                                                 .seed = static_cast<uint64_t>(i),
                                                                                 .timer = &timer,
                                                                                 .counts = &counts}));
  }
  for (size_t i = 0; i < workers.size(); ++i) {
    timer.At(Clock::now() + std::chrono::milliseconds(4 * i), [worker = workers[i].get()] { worker->Start(); });
  }
  Sleep(6);
  {
    std::lock_guard lock(counts.mutex);
    counts.grant_ms.clear();
  }
  const double cpu = daemon.CpuSeconds();
  const Clock::time_point start = Clock::now();
  Sleep(15);
  std::vector<double> grant_ms;
  {
    std::lock_guard lock(counts.mutex);
    grant_ms = counts.grant_ms;
  }
  const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
  const double cores = (daemon.CpuSeconds() - cpu) / seconds;
  counts.stopping = true;
  daemon.Kill();
  counts.WaitForCalls();
  const double p99 = Quantile(grant_ms, 0.99);
  const bool alive = counts.granted >= 1000 && grant_ms.size() > 1000;
  Print({"lease grant, p99", p99, "ms", "< 20", p99 < 20 && alive});
  Print({"  p50", Quantile(grant_ms, 0.5), "ms"});
  Print({"  longest", Quantile(grant_ms, 1), "ms"});
  Print({"  grants", static_cast<double>(grant_ms.size()) / seconds, "1/s"});
  Print({"  cores that the coordinator used", cores, ""});
}

void Benchmark::Restart() {
  const std::filesystem::path state = folder_ / "restart";
  const LongLog log = MakeLongLog(state, {.jobs = kJobs, .shards = kShards, .events = 1'000'000, .after_snapshot = 99'000});
  double clean = 0, killed = 0;
  {
    Daemon daemon(state);
    clean = daemon.seconds_to_serving();
    daemon.Kill();
  }
  for (int i = 0; i < 3; ++i) {
    Daemon daemon(state);
    killed = std::max(killed, daemon.seconds_to_serving());
    const auto stub = v1::JobService::NewStub(daemon.Connect());
    grpc::ClientContext context;
    v1::GetJobRequest request;
    request.set_id(log.last_job);
    v1::Job job;
    Must(FromGrpc(stub->GetJob(&context, request, &job)), "asking for the last job");
    if (job.tasks_done() != log.last_job_done) Must(Internal("the last job has ", job.tasks_done(), " done"), "restart");
    daemon.Kill();
  }
  Print({"restart to serving, after a clean stop", clean, "s", "< 2", clean < 2});
  Print({"restart to serving, after kill -9 (worst of 3)", killed, "s", "< 2", killed < 2});
  Print({"  tasks", static_cast<double>(log.tasks), ""});
  Print({"  events", static_cast<double>(log.events), ""});
}

void Benchmark::Watch() {
  constexpr int kWatchers = 499, kTasks = 400;
  Daemon daemon(folder_ / "watch");
  const std::shared_ptr<grpc::Channel> channel = daemon.Connect();
  const std::string output = UploadOutput(channel);
  const std::string job = SubmitJobs(daemon, 1, kTasks, output).front();
  Sleep(0.5);
  const double before = daemon.ResidentMib();
  std::vector<std::unique_ptr<Watcher>> watchers;
  std::vector<std::shared_ptr<grpc::Channel>> channels;
  for (int i = 0; i < 50; ++i) channels.push_back(daemon.Connect());
  for (int i = 0; i < kWatchers; ++i) watchers.push_back(std::make_unique<Watcher>(channels[i % channels.size()], job));
  SlowWatcher slow(daemon.Connect(), job, 1000);
  double peak = before;
  for (int task = 0; task < kTasks; ++task) {
    PlayOne(channel, output);
    peak = std::max(peak, daemon.ResidentMib());
    Sleep(0.02);
  }
  const std::vector<uint64_t> all = EventsOf(channel, job, 0);  // what a reader sees who comes now
  const Clock::time_point limit = Clock::now() + std::chrono::seconds(60);
  size_t complete = 0;
  while (complete < watchers.size() && Clock::now() < limit) {
    complete = static_cast<size_t>(std::count_if(watchers.begin(), watchers.end(), [&](const auto& w) { return w->Seen() == all; }));
    peak = std::max(peak, daemon.ResidentMib());
    Sleep(0.1);
  }
  std::vector<uint64_t> slowly = slow.Stop();
  const size_t cut = slowly.size();
  for (const uint64_t seq : EventsOf(channel, job, slowly.empty() ? 0 : slowly.back())) slowly.push_back(seq);
  for (const auto& watcher : watchers) watcher->Cancel();
  daemon.Kill();
  const double growth = peak - before;
  Print({"watch: growth with 500 watchers", growth, "MiB", "< 64", growth < 64});
  Print({"watch: watchers that saw every event once", static_cast<double>(complete), "", "= 499", complete == kWatchers});
  Print({"watch: the slow one, events after its resume", static_cast<double>(slowly.size()), "", "= all",
         slowly == all && cut < all.size()});
  Print({"  of them before its resume", static_cast<double>(cut), ""});
  Print({"  events", static_cast<double>(all.size()), ""});
}

int Main(int argc, char** argv) {
  std::filesystem::path folder;
  std::vector<std::string> names;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--folder") == 0 && i + 1 < argc) {
      folder = argv[++i];
    } else {
      names.push_back(argv[i]);
    }
  }
  const TemporaryFolder temporary = Must(TemporaryFolder::Make("refinery-bench"), "making a folder");
  Benchmark benchmark(folder.empty() ? std::filesystem::path(temporary.path()) : folder);
  const std::vector<std::pair<std::string, void (Benchmark::*)()>> all = {{"completions", &Benchmark::Completions},
                                                                          {"grants", &Benchmark::Grants},
                                                                          {"restart", &Benchmark::Restart},
                                                                          {"watch", &Benchmark::Watch}};
  for (const auto& [name, run] : all) {
    if (names.empty() || std::find(names.begin(), names.end(), name) != names.end()) (benchmark.*run)();
  }
  return benchmark.ok() ? 0 : 1;
}

}  // namespace
}  // namespace refinery::bench

int main(int argc, char** argv) { return refinery::bench::Main(argc, argv); }
