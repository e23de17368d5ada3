// server/store/snapshots.h
//
// Snapshots of the coordinator's state, so that a start replays the end of the event log instead of all of it:
//
//   <state>/snapshots/<seq, 20 digits>.snapshot    "refinery snapshot 1\n", seq (8 bytes, little-endian), digest of the
//                                                  bytes ("sha256:..."), the bytes
//
// A file appears by rename after it was synced. The two newest are kept: should one be damaged, the one before stands in, and
// the log still holds every event after it (EventLog::Compact never goes beyond the older one).
//
// Errors: NOT_FOUND when there is none that can be read; RESOURCE_EXHAUSTED, UNAVAILABLE from the disk.
// Threads: any, but one writer at a time.

#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"

namespace refinery::store {

struct StoredSnapshot {
  uint64_t seq = 0;  // the state after this event
  std::string bytes;
};

// Makes the snapshot durable and removes all but the two newest.
Status WriteSnapshot(const std::filesystem::path& state, uint64_t seq, std::string_view bytes);

// Numbers of the snapshots that are there, newest first.
std::vector<uint64_t> ListSnapshots(const std::filesystem::path& state);

// One snapshot. DATA_LOSS when its bytes are not what was written.
StatusOr<StoredSnapshot> ReadSnapshotFile(const std::filesystem::path& state, uint64_t seq);

// The newest one that is whole and not of an event after `max_seq` (a log that was restored may end earlier).
StatusOr<StoredSnapshot> ReadNewestSnapshot(const std::filesystem::path& state, uint64_t max_seq);

}  // namespace refinery::store
