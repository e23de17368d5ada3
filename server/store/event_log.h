// server/store/event_log.h
//
// The coordinator's durable event log: one SQLite database, <state>/refinery.db (docs/formats.md).
//
//   events(seq, job, time_ms, payload)          payload = the serialized Event
//   results(task_digest, output_digest, ...)    one row per task identity that was ever finished, in the same transaction
//
// Profile: WAL, synchronous=FULL, so Append returns only once the events are on disk. SQLite 3.40 can corrupt a WAL when one
// connection checkpoints while another commits; therefore this object's connection is the only one, for commits, checkpoints
// and reads alike. A lock file (flock) keeps a second coordinator out; it vanishes with the process, however that ends.
//
// Errors: UNAVAILABLE when another process holds the folder; DATA_LOSS when the database is damaged or was written by a newer
// version; RESOURCE_EXHAUSTED on a full disk.
// Threads: one at a time.

#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
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

class EventLog {
 public:
  // Opens or creates <folder>/refinery.db. After an unclean stop the whole database is checked first.
  static StatusOr<std::unique_ptr<EventLog>> Open(const std::filesystem::path& folder);
  // Marks a clean stop when every Append before it succeeded.
  ~EventLog();

  // Writes `events` in one transaction and returns after the commit. Their seq must go on from last_seq() without a gap
  // (INTERNAL otherwise). On any error nothing of the batch is kept.
  Status Append(const std::vector<v1::Event>& events);

  // Calls `visit` for every event in order; stops at its first error and returns it.
  Status Replay(const std::function<Status(v1::Event)>& visit);

  // At most `limit` events of `job` with seq > after_seq, in order.
  StatusOr<std::vector<v1::Event>> Read(const std::string& job, uint64_t after_seq, int limit);

  // Digest of the output that the task of identity `task_digest` had; NOT_FOUND when none was finished.
  StatusOr<std::string> ResultOf(const std::string& task_digest);

  uint64_t last_seq() const { return last_seq_; }
  // Whether the last stop was unclean, so that Open ran the integrity check.
  bool was_unclean() const { return was_unclean_; }

 private:
  struct Impl;
  EventLog();
  Status Initialize();
  Status Migrate();

  std::unique_ptr<Impl> impl_;
  uint64_t last_seq_ = 0;
  bool was_unclean_ = false;
  bool failed_ = false;
};

}  // namespace refinery::store
