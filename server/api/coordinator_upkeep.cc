// The coordinator's part that is no decision about jobs: streams and the end of the log in memory, the disk, snapshots, compaction,
// the collection of blobs.

#include <spdlog/spdlog.h>

#include <cstdlib>

#include "common/error_details.h"
#include "server/api/coordinator.h"
#include "server/store/failpoint.h"
#include "server/store/snapshots.h"

namespace refinery::api {
namespace {

constexpr Milliseconds kPumpAllEvery{100};
constexpr size_t kRecentEvents = 8192;
constexpr size_t kRecentBytes = 8 << 20;
constexpr int kCompactedEventsAtATime = 500;
constexpr size_t kTasksLookedAtATime = 5'000;  // by one step of the collection, on the loop

int Percent(double share) { return static_cast<int>(100 * share + 0.5); }

// The number in an environment variable; `otherwise` without it.
uint64_t NumberOf(const char* variable, uint64_t otherwise) {
  const char* text = std::getenv(variable);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

}  // namespace

Status ReadTestSettings(CoordinatorOptions* options) {
  options->exit_after_event = NumberOf("REFINERY_EXIT_AFTER_EVENT", 0);
  options->snapshot_every = NumberOf("REFINERY_SNAPSHOT_EVERY", options->snapshot_every);
  options->collect_every = Milliseconds(NumberOf("REFINERY_COLLECT_MS", options->collect_every.count()));
  options->collect_grace = Milliseconds(NumberOf("REFINERY_COLLECT_MS", options->collect_grace.count()));
  options->event_retention = Milliseconds(NumberOf("REFINERY_RETENTION_MS", options->event_retention.count()));
  return store::CheckFailpointSetting();
}

void Coordinator::AddStream(std::shared_ptr<Stream> stream) {
  if (draining_) stream->Stop();
  streams_.push_back(std::move(stream));
}

void Coordinator::PumpStreams(const jobs::Now& now, jobs::Events events) {
  if (!streams_.empty()) {
    std::set<std::string_view> moved;
    for (const v1::Event& event : events) moved.insert(event.job());
    const bool all = draining_ || now.steady - pumped_all_ >= kPumpAllEvery;
    if (all) pumped_all_ = now.steady;
    Remember(std::move(events));
    std::erase_if(streams_, [&](const std::shared_ptr<Stream>& stream) {
      if (!all && !stream->awake_ && !(!moved.empty() && moved.contains(stream->job()))) return false;
      stream->awake_ = false;
      return !stream->Pump(*this, now);
    });
  } else if (!events.empty()) {
    recent_.clear();  // nobody reads; the next reader starts from the log
    recent_bytes_ = 0;
  }
}

void Coordinator::Remember(jobs::Events events) {
  for (v1::Event& event : events) {
    recent_bytes_ += event.ByteSizeLong();
    recent_.push_back(std::make_shared<const v1::Event>(std::move(event)));
  }
  while (!recent_.empty() && (recent_.size() > kRecentEvents || recent_bytes_ > kRecentBytes)) {
    recent_bytes_ -= recent_.front()->ByteSizeLong();
    recent_.pop_front();
  }
}

StatusOr<Coordinator::EventPage> Coordinator::EventsOf(const jobs::JobState& job, uint64_t after_seq, int limit) {
  EventPage page;
  if (!recent_.empty() && recent_.front()->seq() <= after_seq + 1) {
    for (size_t i = after_seq + 1 - recent_.front()->seq(); i < recent_.size() && page.size() < static_cast<size_t>(limit); ++i) {
      if (recent_[i]->job() == job.id) page.push_back(recent_[i]);
    }
    return page;
  }
  if (after_seq < log_->CompactedTo(job.id)) {
    return OutOfRange("RESYNC: the events of job ", job.id, " up to ", log_->CompactedTo(job.id),
                      " were removed; get the job and watch from its as_of_seq");
  }
  RF_ASSIGN_OR_RETURN(std::vector<v1::Event> events, log_->Read(job.id, after_seq, limit));
  page.reserve(events.size());
  for (v1::Event& event : events) page.push_back(std::make_shared<const v1::Event>(std::move(event)));
  return page;
}

Status Coordinator::CheckDisk(Disk worst) const {
  if (disk_ <= worst) return absl::OkStatus();
  const bool read_only = disk_ == Disk::kReadOnly;
  const std::string full = log_full_ ? Join("the event log in ", options_.state.string(), " could not be written for want of room")
                                     : Join("the disk of the coordinator's state folder ", options_.state.string(), " has ",
                                            (read_only ? options_.disk_read_only : options_.disk_full).Words());
  return WithRetryAfter(WithReason(ResourceExhausted(full, "; until space is freed there ",
                                                     read_only ? "nothing is taken in" : "no new work is taken on"), "DISK_FULL"),
                        std::chrono::seconds(1));
}

// Events of the turn could not be written, so it must not have been. Reading it all again takes as long as a restart does.
void Coordinator::TakeBack(const Status& why, bool has_events) {
  spdlog::error("read-only until there is room; what could not be written is taken back: {}", Message(why));
  const Status rebuilt = has_events ? core_->Rebuild([this] { return Recover(); }) : absl::OkStatus();
  if (!rebuilt.ok()) {
    spdlog::critical("stopping, because the state cannot be made anew from the log: {}", Message(rebuilt));
    std::_Exit(1);
  }
  log_full_ = true;
  disk_ = Disk::kReadOnly;
  core_->SetReadOnly(CheckDisk(Disk::kFull));
  access_.Rewind(core_->state().last_seq);
  references_.clear();  // its place in the order of jobs may not exist any more
  references_next_ = 0;
}

// Once a second while the log is full.
void Coordinator::GoOnIfThereIsRoom() {
  if (!log_full_) return;
  const Status writable = log_->TryWriting();
  if (absl::IsResourceExhausted(writable)) return;
  if (!writable.ok()) {
    spdlog::critical("stopping, because the event log cannot be used: {}", Message(writable));
    std::_Exit(1);
  }
  Post([this](Turn& turn) {
    spdlog::info("the event log can be written again");
    log_full_ = false;
    core_->SetReadOnly(absl::OkStatus());
    core_->StartGrace(turn.now, &turn.events);
  });
}

// Once a second.
void Coordinator::LookAfter(const jobs::Now& now) {
  GoOnIfThereIsRoom();
  if (const StatusOr<store::DiskSpace> space = blobs_->Space(); space.ok()) {
    const Disk disk = log_full_ || options_.disk_read_only.IsPassed(*space) ? Disk::kReadOnly
                      : options_.disk_full.IsPassed(*space)                 ? Disk::kFull
                                                                            : Disk::kOk;
    if (disk != disk_) {
      spdlog::log(disk == Disk::kOk ? spdlog::level::info : spdlog::level::err, "disk used={} % of {}: {}", Percent(space->used()),
                  options_.state.string(), disk == Disk::kOk ? "all work is taken on again"
                                           : disk == Disk::kFull ? "no new jobs and leases" : "read-only");
    }
    disk_ = disk;
    core_->HoldStalls(disk != Disk::kOk, now);
    metrics_.OnDisk(space->used(), disk != Disk::kOk, disk == Disk::kReadOnly);
  }
  CheckLogIfDue();
  MakeSnapshotIfDue();
  CompactOne(now);
  CollectIfDue(now);
}

void Coordinator::CheckLogIfDue() {
  if (!check_due_) return;
  const bool started = upkeep_.Start([folder = options_.state] {
    const Status status = store::CheckEventLog(folder);
    if (status.ok()) return spdlog::info("the event log is whole");
    spdlog::critical("stopping: {}", Message(status));
    if (absl::IsDataLoss(status)) std::_Exit(1);
  });
  if (started) check_due_ = false;
}

void Coordinator::MakeSnapshotIfDue() {
  const uint64_t last = log_->last_seq();
  const uint64_t since = std::max(snapshot_seq_, failed_snapshot_seq_);
  if (last < since + options_.snapshot_every) return;
  upkeep_.Start([this, last] {
    const auto start = std::chrono::steady_clock::now();
    const Status status = MakeSnapshot(options_.state, options_.code_version, last);
    const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
    Post([this, last, status, took](Turn&) {
      if (!status.ok()) {
        failed_snapshot_seq_ = last;
        return spdlog::error("no snapshot could be made: {}", Message(status));
      }
      spdlog::info("snapshot seq={} seconds={:.2f}", last, took.count());
      if (snapshot_seq_ != last) older_snapshot_seq_ = snapshot_seq_;  // a rebuild may have read it already
      snapshot_seq_ = last;
    });
  });
}

// A part of one old job's events at a time: removing is as durable as adding, and the loop must not stand still for it.
void Coordinator::CompactOne(const jobs::Now& now) {
  const std::vector<std::string>& order = core_->state().order;
  if (older_snapshot_seq_ == 0 || order.empty() || log_full_) return;
  for (size_t looked = 0; looked < std::min<size_t>(order.size(), 1000); ++looked) {
    if (compact_next_ >= order.size()) compact_next_ = 0;
    const jobs::JobState& job = core_->state().jobs.at(order[compact_next_]);
    const bool old = jobs::IsTerminal(job.state) && job.last_seq <= older_snapshot_seq_ &&
                     now.unix_ms - job.end_time_ms > options_.event_retention.count();
    if (!old || compacted_.contains({job.last_seq, job.id})) {
      ++compact_next_;
      continue;
    }
    const StatusOr<int> removed = log_->Compact(job.id, job.last_seq, kCompactedEventsAtATime);
    if (!removed.ok()) return spdlog::error("{}", Message(removed.status()));
    if (*removed == 0) compacted_.insert({job.last_seq, job.id});
    return;  // the rest in a second
  }
}

void Coordinator::CollectIfDue(const jobs::Now& now) {
  if (options_.collect_every.count() == 0 || collecting_) return;
  if (references_next_ == 0 && now.steady - collected_ < options_.collect_every) return;
  const std::vector<std::string>& order = core_->state().order;
  for (size_t tasks = 0; references_next_ < order.size() && tasks < kTasksLookedAtATime; ++references_next_) {
    const jobs::JobState& job = core_->state().jobs.at(order[references_next_]);
    AddReferences(job, &references_);
    tasks += job.tasks.size();
  }
  if (references_next_ < order.size()) return;  // goes on in a second; what is referred to from now on was asked for
  collecting_ = upkeep_.Start([this, artifacts = std::move(references_), steady = now.steady] {
    const StatusOr<Collected> collected = Collect(*blobs_, artifacts, steady, options_.collect_grace);
    Post([this, collected, gone = access_.Gone(*blobs_)](Turn& turn) {
      collecting_ = false;
      collected_ = turn.now.steady;
      if (!collected.ok()) return spdlog::error("collecting blobs failed: {}", Message(collected.status()));
      const store::BlobStore::Swept& swept = collected->swept;
      metrics_.OnCollected(swept.deleted_bytes);
      spdlog::info("collected blobs={} bytes={} candidates={} lost={}", swept.deleted, swept.deleted_bytes, swept.candidates,
                   collected->lost.size());
      turn.core.OnLost(collected->lost, turn.now, &turn.events);
      if (gone.empty() || disk_ == Disk::kReadOnly) return;
      const Status forgotten = log_->RemoveOwners(access_.Forget(*blobs_, gone));
      if (!forgotten.ok()) spdlog::error("{}", Message(forgotten));
    });
  });
  references_.clear();
  references_next_ = 0;
}

}  // namespace refinery::api
