// server/store/event_log.h
//
// The coordinator's durable event log: one SQLite database, <state>/refinery.db (docs/formats.md).
//
//   events(seq, job, time_ms, payload)          payload = the serialized Event
//   results(task_digest, output_digest, ...)    one row per task identity that was ever finished, in the same transaction
//   artifact_owner(digest, tenant)              blobs that a tenant's callers uploaded; what its jobs use is known from the events
//   compacted(job, up_to)                       jobs whose events up to `up_to` were removed: they ended long ago, and a
//                                               snapshot holds what they came to
//
// Profile: WAL, synchronous=FULL, so Append returns only once the events are on disk. SQLite 3.40 can corrupt a WAL when one
// connection checkpoints while another commits; therefore this object's connection does all commits and checkpoints; the
// functions beside it open the file read-only and do neither. A lock file (flock) keeps a second coordinator out; it vanishes
// with the process, however that ends.
//
// Errors: UNAVAILABLE when another process holds the folder; DATA_LOSS when the database is damaged or was written by a newer
// version; RESOURCE_EXHAUSTED on a full disk.
// Threads: an EventLog is used by one at a time; the functions may be called from any thread while it is in use.

#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "common/status.h"
#include "refinery/v1/events.pb.h"

namespace refinery::store {

// Exclusive ownership of a state folder for as long as the object lives.
class FolderLock {
 public:
  // UNAVAILABLE naming the holder's process id when another process has it.
  static StatusOr<FolderLock> Take(const std::filesystem::path& folder);
  FolderLock(FolderLock&& other) noexcept;
  FolderLock& operator=(FolderLock&&) = delete;
  ~FolderLock();

 private:
  explicit FolderLock(int fd) : fd_(fd) {}
  int fd_;
};

// A blob that callers of a tenant have uploaded.
struct ArtifactOwner {
  std::string digest;
  std::string tenant;
};

class EventLog {
 public:
  // Opens or creates <folder>/refinery.db. After an unclean stop the database is checked first, unless it is so large that this
  // would keep everyone waiting: then check_is_due() and the caller runs CheckEventLog beside its work. What a failed check left
  // behind (the file "damaged_log") makes the next Open check everything, however long it takes.
  static StatusOr<std::unique_ptr<EventLog>> Open(const std::filesystem::path& folder);
  // Marks a clean stop when every Append before it succeeded.
  ~EventLog();

  // Writes `events` in one transaction and returns after the commit. Their seq must go on from last_seq() without a gap
  // (INTERNAL otherwise). On any error nothing of the batch is kept. After RESOURCE_EXHAUSTED, a full disk, the log is as it was
  // and may be used on; after any other error it may not.
  // `owners` go along; known ones are not added twice.
  Status Append(const std::vector<v1::Event>& events, const std::vector<ArtifactOwner>& owners = {});
  // Writes and removes as much as a large batch takes: OK when there is room again.
  Status TryWriting();
  // From now on the database may not grow beyond so many bytes, as if the disk ended there; 0 = it may. For tests.
  void LimitBytes(uint64_t bytes);

  // Calls `visit` for every event after `after_seq` in order; stops at its first error and returns it. DATA_LOSS when one is
  // missing.
  Status Replay(const std::function<Status(v1::Event)>& visit, uint64_t after_seq = 0);

  // At most `limit` events of `job` with seq > after_seq, in order.
  StatusOr<std::vector<v1::Event>> Read(const std::string& job, uint64_t after_seq, int limit);

  // Removes at most `limit` events of a job that has ended, none later than `up_to`, which a durable snapshot must cover; returns
  // how many went. From the first call on they count as gone, so that nobody reads half of them.
  StatusOr<int> Compact(const std::string& job, uint64_t up_to, int limit);
  // The last event of the job that is not there any more; 0 when all are.
  uint64_t CompactedTo(const std::string& job) const;

  // Digest of the output that the task of identity `task_digest` had; NOT_FOUND when none was finished.
  StatusOr<std::string> ResultOf(const std::string& task_digest);

  StatusOr<std::vector<ArtifactOwner>> ReadOwners();
  Status RemoveOwners(const std::vector<ArtifactOwner>& owners);

  uint64_t last_seq() const { return last_seq_; }
  // Whether the last stop was unclean.
  bool was_unclean() const { return was_unclean_; }
  // Whether it was, and Open left the check to the caller.
  bool check_is_due() const { return check_is_due_; }

 private:
  struct Impl;
  EventLog();
  Status Initialize(const std::filesystem::path& folder);
  Status Migrate();
  void Insert(const v1::Event& event);
  Status CheckAfterUncleanStop(const std::filesystem::path& folder);
  Status AfterFailure(const Status& failure);

  std::unique_ptr<Impl> impl_;
  uint64_t last_seq_ = 0;
  std::map<std::string, uint64_t> compacted_;
  bool was_unclean_ = false;
  bool check_is_due_ = false;
  bool failed_ = false;
};

// Reads the events after `after_seq` up to and with `up_to` of the log in `folder` on a connection of its own.
Status ReplayEventLog(const std::filesystem::path& folder, uint64_t after_seq, uint64_t up_to,
                      const std::function<Status(v1::Event)>& visit);

// SQLite's own check of the whole file. DATA_LOSS says what is damaged and leaves the file "damaged_log" behind.
Status CheckEventLog(const std::filesystem::path& folder);

// Copies the database of `folder`, which may be in use, to the file `target`, which must not exist: one moment of it, whole.
// Returns the number of its last event.
StatusOr<uint64_t> CopyEventLog(const std::filesystem::path& folder, const std::filesystem::path& target);

}  // namespace refinery::store
