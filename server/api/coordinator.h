// server/api/coordinator.h
//
// Puts the pure core to work: one thread (the loop) owns the core, the event log and the fleet, and runs commands in turns.
//
//   take up to 256 waiting commands -> run each against the core -> expire leases, write reports, grant leases
//   -> commit all new events in one transaction -> answer -> feed the watching streams
//
// So nothing is answered before it is durable, many commands share one fsync, and no lock guards the state. When a commit
// fails the process ends: its memory is ahead of its log, and a restart puts that right.
//
// Threads: Post and blobs() from any thread; everything else on the loop, that is, inside a command or a stream.

#pragma once

#include <condition_variable>
#include <deque>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "common/limits.h"
#include "common/status.h"
#include "server/api/fleet.h"
#include "server/jobs/core.h"
#include "server/metrics/metrics.h"
#include "server/report/report.h"
#include "server/store/attempt_logs.h"
#include "server/store/blob_store.h"
#include "server/store/event_log.h"

namespace refinery::api {

struct CoordinatorOptions {
  std::filesystem::path state;  // folder
  Milliseconds lease_ttl = limits::kLeaseTtl;
  Milliseconds long_poll = limits::kLongPoll;
  Milliseconds watch_heartbeat = limits::kWatchHeartbeat;
  Milliseconds retry_backoff{1'000};
  std::string code_version = REFINERY_VERSION;
  std::function<report::Report(const report::ReportInput&)> make_report;  // required
  uint64_t exit_after_event = 0;  // for tests: the process ends as if killed after this many committed events; 0 = never
};

class Coordinator {
 public:
  // What a command may touch. `replies` run after the commit, in order.
  struct Turn {
    jobs::Core& core;
    jobs::Now now;
    jobs::Events events;
    std::vector<std::function<void()>> replies;
  };
  using Command = std::function<void(Turn&)>;

  // Something that sends on its own as the state moves on: a watch, a log tail.
  class Stream {
   public:
    virtual ~Stream() = default;
    // Called after every turn and at least every 100 ms; sends what it can without waiting. False: it has ended.
    virtual bool Pump(Coordinator& coordinator, const jobs::Now& now) = 0;
    // The coordinator is shutting down: end now, with a word that says so.
    virtual void Stop() = 0;
  };

  // Opens the state folder, replays the log and starts the loop. Errors as EventLog::Open's.
  static StatusOr<std::unique_ptr<Coordinator>> Open(CoordinatorOptions options);
  // Stops the loop; commands that are still waiting are dropped.
  ~Coordinator();

  void Post(Command command);
  store::BlobStore& blobs() { return *blobs_; }
  metrics::Metrics& metrics() { return metrics_; }

  // On the loop:
  const jobs::Core& core() const { return *core_; }
  store::EventLog& log() { return *log_; }
  store::AttemptLogs& logs() { return logs_; }
  Fleet& fleet() { return fleet_; }
  const CoordinatorOptions& options() const { return options_; }
  void AddStream(std::shared_ptr<Stream> stream);

  // From any thread: grants no more leases, answers every poll, ends every stream. Other calls are still answered.
  void BeginShutdown();

 private:
  explicit Coordinator(CoordinatorOptions options);
  Status Start();
  void Run();
  void RunTurn(std::vector<Command> commands);
  void WriteReports(Turn& turn);
  Status WriteReport(Turn& turn, const std::string& job);
  void GrantLeases(Turn& turn);
  void Commit(const Turn& turn);
  void UpdateMetrics(const jobs::Now& now);

  const CoordinatorOptions options_;
  std::unique_ptr<store::EventLog> log_;
  std::unique_ptr<store::BlobStore> blobs_;
  store::AttemptLogs logs_;
  std::unique_ptr<jobs::Core> core_;
  Fleet fleet_;
  metrics::Metrics metrics_;
  std::vector<std::shared_ptr<Stream>> streams_;
  struct ReportRetry {
    int failures = 0;
    Milliseconds not_before{0};
  };
  std::map<std::string, ReportRetry> report_retries_;
  Milliseconds metrics_updated_{-1'000'000};
  uint64_t committed_events_ = 0;

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Command> commands_;  // guarded by mutex_
  bool stopping_ = false;         // guarded by mutex_
  bool draining_ = false;         // on the loop
  std::thread thread_;
};

// The time of now, as the core wants it.
jobs::Now ReadClocks();

}  // namespace refinery::api
