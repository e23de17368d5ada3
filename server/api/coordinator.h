// server/api/coordinator.h
//
// Puts the pure core to work: one thread (the loop) owns the core, the event log and the fleet, and runs commands in turns.
//
//   take up to 256 waiting commands -> run each against the core -> expire leases, write reports, grant leases
//   -> commit all new events in one transaction -> answer -> log and count -> feed the watching streams
//
// So nothing is answered before it is durable, many commands share one fsync, and no lock guards the state. When a commit
// fails for want of room the state is made anew from the log, every caller of the turn gets RESOURCE_EXHAUSTED, and nothing changes until
// there is room again; for any other reason the process ends: its memory is ahead of its log, and a restart puts that right.
//
// Start: the newest snapshot, then the events after it. Beside the loop (upkeep.h): the check of the log after an unclean stop,
// snapshots, the collection of blobs. Events of jobs that ended `event_retention` ago are removed once two snapshots hold them.
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
#include "server/api/blob_access.h"
#include "server/api/fleet.h"
#include "server/api/upkeep.h"
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
  // Part of every task's identity: results of another one are not reused. The number behind '+' rises when a task kind comes to make
  // other outputs of the same inputs within a version (1: quantization is calibrated without the validation examples).
  std::string code_version = REFINERY_VERSION "+1";
  std::function<report::Report(const report::ReportInput&)> make_report;  // required
  uint64_t snapshot_every = 100'000;                 // events
  Milliseconds event_retention{std::chrono::hours(24 * 90)};  // after a job's end; then it can only be shown, not watched anew
  Milliseconds collect_every{std::chrono::hours(1)};  // unreferenced blobs are looked for; 0 = never
  Milliseconds collect_grace{std::chrono::hours(24)};
  store::DiskMark disk_full = store::kDiskFull;           // no new jobs and no new leases
  store::DiskMark disk_read_only = store::kDiskReadOnly;  // no uploads and no results either
  std::function<StatusOr<store::DiskSpace>(const std::filesystem::path&)> space_of = store::SpaceOf;
  uint64_t exit_after_event = 0;  // for tests: the process ends as if killed after this many committed events; 0 = never
};

// Settings that only tests change, from the environment: REFINERY_EXIT_AFTER_EVENT, REFINERY_SNAPSHOT_EVERY (events),
// REFINERY_COLLECT_MS (how often, and the grace), REFINERY_RETENTION_MS. INVALID_ARGUMENT for an unknown REFINERY_FAILPOINT.
Status ReadTestSettings(CoordinatorOptions* options);

class Coordinator {
 public:
  // What a command may touch. `replies` run after the commit, in order, and hear how it went: after a failed one the caller must be told
  // so, whatever the command came to.
  struct Turn {
    jobs::Core& core;
    jobs::Now now;
    jobs::Events events;
    std::vector<std::function<void(const Status& committed)>> replies;
    std::vector<store::ArtifactOwner> owners;  // of blobs that were uploaded
  };
  using Command = std::function<void(Turn&)>;

  // How full the disk is, looked at once a second; kReadOnly also while the log cannot be written.
  enum class Disk { kOk, kFull, kReadOnly };

  // Something that sends on its own as the state moves on: a watch, a log tail.
  class Stream {
   public:
    virtual ~Stream() = default;
    // Called when an event of its job was committed, when Wake was called, and at least every 100 ms; sends what it can without
    // waiting. False: it has ended.
    virtual bool Pump(Coordinator& coordinator, const jobs::Now& now) = 0;
    // The coordinator is shutting down: end now, with a word that says so.
    virtual void Stop() = 0;
    // The job it follows; it hears of every event while this is not known yet.
    virtual const std::string& job() const = 0;
    // Something happened to the stream itself.
    void Wake() { awake_ = true; }

   private:
    friend class Coordinator;
    bool awake_ = true;
  };

  // Opens the state folder, replays the log and starts the loop. Errors as EventLog::Open's.
  static StatusOr<std::unique_ptr<Coordinator>> Open(CoordinatorOptions options);
  // Stops the loop; commands that are still waiting are dropped.
  ~Coordinator();

  void Post(Command command);
  store::BlobStore& blobs() { return *blobs_; }
  BlobAccess& access() { return access_; }
  metrics::Metrics& metrics() { return metrics_; }

  // On the loop:
  const jobs::Core& core() const { return *core_; }
  store::EventLog& log() { return *log_; }
  store::AttemptLogs& logs() { return logs_; }
  Fleet& fleet() { return fleet_; }
  const CoordinatorOptions& options() const { return options_; }
  Disk disk() const { return disk_; }
  // RESOURCE_EXHAUSTED when the disk is too full to take on new work (a job), or even results.
  Status CheckDisk(Disk worst) const;
  // Events of `job` after `after_seq`, at most `limit`, in order: from memory when they are recent. OUT_OF_RANGE (RESYNC) when some
  // of them were removed from the log.
  using EventPage = std::vector<std::shared_ptr<const v1::Event>>;
  StatusOr<EventPage> EventsOf(const jobs::JobState& job, uint64_t after_seq, int limit);
  void AddStream(std::shared_ptr<Stream> stream);
  // Held: no more leases are granted, until it is set back; everything else goes on.
  bool held() const { return held_; }
  void set_held(bool held) { held_ = held; }

  // From any thread: grants no more leases, answers every poll, ends every stream. Other calls are still answered.
  void BeginShutdown();

 private:
  explicit Coordinator(CoordinatorOptions options);
  Status Start();
  Status Recover();
  void PumpStreams(const jobs::Now& now, jobs::Events events);
  void Record(const jobs::Events& events);
  void Remember(jobs::Events events);
  // Upkeep:
  void LookAfter(const jobs::Now& now);
  void CheckLogIfDue();
  void MakeSnapshotIfDue();
  void CompactOne(const jobs::Now& now);
  void CollectIfDue(const jobs::Now& now);
  void Run();
  void RunTurn(std::vector<Command> commands);
  void WriteReports(Turn& turn);
  Status WriteReport(Turn& turn, const std::string& job);
  void GrantLeases(Turn& turn);
  void GrantGang(Turn& turn, std::vector<scheduler::Decision> members);
  // A port of the worker that no gang meets at; 0 when it keeps none.
  uint32_t MeetingPort(const std::string& worker) const;
  Status Commit(Turn& turn);
  void TakeBack(const Status& why, bool has_events);
  void GoOnIfThereIsRoom();
  void UpdateMetrics(const jobs::Now& now);

  const CoordinatorOptions options_;
  std::unique_ptr<store::EventLog> log_;
  std::unique_ptr<store::BlobStore> blobs_;
  BlobAccess access_;
  store::AttemptLogs logs_;
  std::unique_ptr<jobs::Core> core_;
  Fleet fleet_;
  metrics::Metrics metrics_;
  std::vector<std::shared_ptr<Stream>> streams_;
  Milliseconds pumped_all_{-1'000'000};
  Milliseconds scheduled_{-1'000'000};
  std::deque<std::shared_ptr<const v1::Event>> recent_;  // the end of the log, without a gap
  size_t recent_bytes_ = 0;
  struct ReportRetry {
    int failures = 0;
    Milliseconds not_before{0};
  };
  std::map<std::string, ReportRetry> report_retries_;
  Milliseconds metrics_updated_{-1'000'000};
  uint64_t committed_events_ = 0;
  Disk disk_ = Disk::kOk;
  bool log_full_ = false;            // the last commit failed for want of room
  bool check_due_ = false;
  uint64_t snapshot_seq_ = 0;        // of the newest snapshot
  uint64_t older_snapshot_seq_ = 0;  // of the one before: nothing after it is removed from the log
  uint64_t failed_snapshot_seq_ = 0; // last event when making one failed
  size_t compact_next_ = 0;          // position in the order of jobs
  std::set<std::pair<uint64_t, std::string>> compacted_;  // (last event, job): nothing is left to remove
  Milliseconds collected_{0};
  std::vector<std::string> references_;  // found so far by the pass that runs
  size_t references_next_ = 0;           // job at which it goes on
  bool collecting_ = false;

  std::mutex mutex_;
  std::condition_variable wake_;
  std::deque<Command> commands_;  // guarded by mutex_
  bool stopping_ = false;         // guarded by mutex_
  bool draining_ = false;         // on the loop
  bool held_ = false;             // on the loop
  std::thread thread_;
  Upkeep upkeep_;  // goes first
};

// The time of now, as the core wants it.
jobs::Now ReadClocks();

}  // namespace refinery::api
