// kill -9 of the coordinator under load, against a ledger of what it had acknowledged.

#include <algorithm>
#include <random>
#include <set>

#include "common/grpc_status.h"
#include "tests/e2e/reliability.h"
#include "tests/server/api/fake_worker.h"

namespace refinery::reliability {
namespace {

constexpr size_t kOpenJobs = 12;   // submitted and not ended, at most
constexpr int kSubmitters = 2;
constexpr int kWorkers = 3;

struct Done {
  std::string job, path, digest;
};

// What was acknowledged. Guarded by `mutex`.
struct Ledger {
  std::mutex mutex;
  std::map<std::string, std::string> created;  // request id -> job
  std::set<std::string> cancelled;
  std::vector<Done> completed;
  std::vector<std::pair<std::string, uint64_t>> checkpoints;  // (job, count) is enough to count them
  std::atomic<uint64_t> mutations{0};
};

class Load {
 public:
  Load(Coordinator* coordinator, Ledger* ledger) : coordinator_(coordinator), ledger_(ledger) {
    for (int i = 0; i < kSubmitters; ++i) threads_.emplace_back([this, i] { SubmitJobs(i); });
    for (int i = 0; i < kWorkers; ++i) threads_.emplace_back([this, i] { Work(i); });
  }
  ~Load() {
    stopping_ = true;
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  void SubmitJobs(int submitter) {
    const auto channel = coordinator_->Connect();
    const auto stub = v1::JobService::NewStub(channel);
    std::mt19937 random(submitter);
    std::vector<std::string> open;
    for (int n = 0; !stopping_; ++n) {
      const std::string request_id = Join("s", submitter, "-", n);
      const auto job = Submit(channel, Recipe("x", 3, submitter * 100'000 + n), request_id);
      if (!job.ok()) continue;
      {
        std::lock_guard lock(ledger_->mutex);
        ledger_->created[request_id] = *job;
      }
      ++ledger_->mutations;
      open.push_back(*job);
      if (random() % 3 == 0) Cancel(*stub, open[random() % open.size()]);
      while (!stopping_ && open.size() > kOpenJobs / kSubmitters) {
        std::erase_if(open, [&](const std::string& id) {
          const auto now = Describe(channel, id);
          return now.ok() && now->state() >= v1::Job::SUCCEEDED;
        });
        if (open.size() > kOpenJobs / kSubmitters) Cancel(*stub, open[random() % open.size()]);
      }
    }
  }

  void Cancel(v1::JobService::Stub& stub, const std::string& job) {
    v1::CancelJobRequest request;
    request.set_id(job);
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(2));
    v1::Job answer;
    if (!stub.CancelJob(&context, request, &answer).ok()) return;
    ++ledger_->mutations;
    if (answer.state() != v1::Job::CANCELLED && answer.state() != v1::Job::CANCELLING) return;  // it had ended before
    std::lock_guard lock(ledger_->mutex);
    ledger_->cancelled.insert(job);
  }

  void Work(int i) {
    const auto channel = coordinator_->Connect();
    testing::FakeWorker worker(channel, Join("w", i));
    while (!stopping_) {
      const auto lease = worker.Next(1'000);
      if (!lease.ok()) Sleep(0.02);
      if (!lease.ok() || lease->token().job().empty()) continue;
      const auto request = worker.MakeSuccess(*lease);
      if (!request.ok()) continue;
      const Status status = Persist([&] { return stopping_ ? absl::OkStatus() : worker.Complete(*request); }, 3);
      if (!status.ok() || stopping_) continue;
      ++ledger_->mutations;
      std::lock_guard lock(ledger_->mutex);
      ledger_->completed.push_back({lease->token().job(), lease->token().path(), request->success().output().digest()});
    }
  }

  Coordinator* const coordinator_;
  Ledger* const ledger_;
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> threads_;
};

// Acknowledged changes that are not there.
int CountLost(const std::shared_ptr<grpc::Channel>& channel, Ledger& ledger) {
  std::lock_guard lock(ledger.mutex);
  std::map<std::string, v1::Job> jobs;
  int lost = 0;
  for (const auto& [request_id, id] : ledger.created) {
    const auto job = Describe(channel, id);
    if (!job.ok() || job->id() != id) ++lost;
    if (job.ok()) jobs[id] = *job;
  }
  for (const std::string& id : ledger.cancelled) {
    const v1::Job::State state = jobs[id].state();
    lost += state != v1::Job::CANCELLED && state != v1::Job::CANCELLING;
  }
  for (const Done& done : ledger.completed) {
    const v1::Job& job = jobs[done.job];
    const auto task = std::find_if(job.tasks().begin(), job.tasks().end(), [&](const v1::Task& t) { return t.path() == done.path; });
    lost += task == job.tasks().end() || task->state() != v1::Task::DONE || task->output().digest() != done.digest;
  }
  return lost;
}

}  // namespace

// Goal: what was acknowledged survives kill -9.  Method: submitters and workers change things all the time and write down what was
// acknowledged; the coordinator is killed at random moments; every entry must be there after every kill.
void Kills(const Settings& settings, Checks& checks) {
  Coordinator coordinator({.state = settings.folder / "kills",
                           .flags = {"--lease-ttl-ms", "1000", "--log-level", "warn"},
                           .environment = {{"REFINERY_SNAPSHOT_EVERY", "500"}}});
  const auto channel = coordinator.Connect();
  Ledger ledger;
  std::mt19937 random(20'261);
  int lost = 0;
  double longest_start = 0;
  {
    const Load load(&coordinator, &ledger);
    for (int i = 0; i < settings.kills; ++i) {
      const uint64_t before = ledger.mutations;
      const Clock::time_point limit = Clock::now() + std::chrono::seconds(5);
      while (ledger.mutations < before + 5 && Clock::now() < limit) Sleep(0.002);
      Sleep(std::uniform_real_distribution<double>(0, settings.full ? 0.5 : 0.3)(random));
      coordinator.Kill();
      const Clock::time_point start = Clock::now();
      coordinator.Start();
      longest_start = std::max(longest_start, SecondsSince(start));
      if (i % 10 == 9) lost += CountLost(channel, ledger);
    }
  }
  lost += CountLost(channel, ledger);
  // A repeated request after all this names the same job.
  int renamed = 0;
  for (const auto& [request_id, id] : std::map<std::string, std::string>(ledger.created)) {
    const size_t dash = request_id.find('-');
    const int submitter = std::atoi(request_id.substr(1, dash - 1).c_str());
    const auto again = Submit(channel, Recipe("x", 3, submitter * 100'000 + std::atoi(request_id.c_str() + dash + 1)), request_id);
    renamed += !again.ok() || *again != id;
  }
  const auto mutations = static_cast<double>(ledger.mutations);
  checks.Row(Join("kill -9 x ", settings.kills, ": acknowledged mutations lost"), lost, "", "= 0",
             lost == 0 && mutations >= 5.0 * settings.kills);
  checks.Row("  acknowledged mutations", mutations, "", "", true);
  checks.Row("  repeated submissions that made another job", renamed, "", "= 0", renamed == 0);
  checks.Row("  longest restart", longest_start, "s", "", true);
}

}  // namespace refinery::reliability
