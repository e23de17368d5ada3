// server/store/backup.h
//
// Copies of a state folder, made while a coordinator uses it or not:
//
//   <backup>/refinery.db     the event log at one moment (SQLite's online backup)
//   <backup>/snapshots/ cas/ logs/    as in the state folder (docs/formats.md)
//   <backup>/backup.json     {"last_seq", "blobs", "bytes"}: written last, so that a folder without it is no backup
//
// The log is copied first, then the blobs: what it names was there before it, and what is collected meanwhile had its grace
// (BlobStore::Sweep), which must be longer than a backup takes.
//
// Errors: ALREADY_EXISTS for a target that holds something; FAILED_PRECONDITION for a source that is no backup or is incomplete;
// DATA_LOSS for damaged bytes; RESOURCE_EXHAUSTED for a full disk.
// Threads: any; both take as long as the bytes need: never call them on the coordinator's loop.

#pragma once

#include <cstdint>
#include <filesystem>

#include "common/status.h"

namespace refinery::store {

struct BackupInfo {
  uint64_t last_seq = 0;  // the last event in it
  uint64_t blobs = 0;
  uint64_t bytes = 0;     // of the blobs
};

// Copies the state folder `state` into the folder `target`, which must not exist or be empty. A target whose backup broke off
// must be removed first.
StatusOr<BackupInfo> Backup(const std::filesystem::path& state, const std::filesystem::path& target);

// Makes the state folder `state` from a backup. `state` must not exist or be empty; no coordinator may run on it. Every blob is
// hashed on the way and the database checked; the database appears last, so that a restore that breaks off leaves no state
// folder that a coordinator would start on.
StatusOr<BackupInfo> Restore(const std::filesystem::path& backup, const std::filesystem::path& state);

}  // namespace refinery::store
