// server/store/blob_store.h
//
// Content-addressed blobs in folders:
//
//   <state>/cas/<first two hex digits>/<64 hex digits>   complete blobs, read-only, named by their SHA-256
//   <state>/tmp/<64 hex digits>[.<scope>].partial        uploads; whoever comes next goes on where they end
//
// A blob appears by rename after its bytes were hashed and synced, so a file under cas/ is complete; reading hashes it again
// and DATA_LOSS moves a damaged one to <state>/damaged, after which it counts as missing and can be uploaded anew.
//
// Blobs that nothing refers to any more are collected in two phases (Sweep): found without a reference they become candidates,
// and only when they still are after a grace they go. Whoever asks for a blob, uploads or reads it, takes it off the list.
//
// The disk: behind the mark `read_only` nothing is taken in; the coordinator stops admitting jobs before that.
//
// Threads: every method may be called from any thread; an Upload and a Reader belong to one thread each.

#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include "common/digest.h"
#include "common/status.h"

namespace refinery::store {

struct DiskSpace {
  uint64_t total_bytes = 0;  // that this user may use
  uint64_t free_bytes = 0;
  double used() const { return total_bytes == 0 ? 1 : 1 - static_cast<double>(free_bytes) / static_cast<double>(total_bytes); }
};
// Of the file system that holds `path`. UNAVAILABLE when it cannot be examined.
StatusOr<DiskSpace> SpaceOf(const std::filesystem::path& path);

// When a disk counts as full: more than this share of it is used and less than so much is free. The share alone would refuse a
// large disk that has room for days, the bytes alone a small one that is empty.
struct DiskMark {
  double used_above = 1;
  uint64_t free_below = 0;
  bool IsPassed(const DiskSpace& space) const { return space.used() > used_above && space.free_bytes < free_below; }
  // "more than 90 % used and less than 20 GiB free"
  std::string Words() const;
};
inline constexpr DiskMark kDiskFull{.used_above = 0.90, .free_below = uint64_t{20} << 30};
inline constexpr DiskMark kDiskReadOnly{.used_above = 0.97, .free_below = uint64_t{5} << 30};

struct BlobStoreOptions {
  DiskMark read_only = kDiskReadOnly;
  std::function<StatusOr<DiskSpace>(const std::filesystem::path&)> space_of = SpaceOf;
};

class BlobStore {
 public:
  // Opens <state>, creates the folders and counts what is there.
  static StatusOr<std::unique_ptr<BlobStore>> Open(const std::filesystem::path& state, BlobStoreOptions options = {});

  class Upload;
  class Reader;

  bool Contains(const std::string& digest) const;
  // The same without a wish to have it: it may be collected all the same.
  bool IsStored(const std::string& digest) const;
  // Bytes of a complete blob; NOT_FOUND.
  StatusOr<uint64_t> SizeOf(const std::string& digest) const;
  // Bytes of an unfinished upload that are already here (0 when none was begun). Uploads of different scopes (the tenants of their
  // senders; lower-case letters, digits and '-') have nothing to do with each other: each must send all the bytes.
  uint64_t PartialSize(const std::string& digest, const std::string& scope = "") const;

  // Begins or resumes an upload of `size` bytes at `offset`, which must be PartialSize (OUT_OF_RANGE names the right one).
  // Two uploads of one blob: the later takes over, the earlier gets ABORTED at its next write, so that a dead connection
  // cannot hold an upload up. RESOURCE_EXHAUSTED when the disk has no room for it.
  StatusOr<std::unique_ptr<Upload>> StartUpload(const std::string& digest, uint64_t size, uint64_t offset,
                                                const std::string& scope = "");

  // Stores bytes that this process holds; returns their digest.
  StatusOr<std::string> Put(std::string_view bytes);
  // The whole blob, checked. NOT_FOUND, DATA_LOSS, RESOURCE_EXHAUSTED when larger than `max_bytes`.
  StatusOr<std::string> Get(const std::string& digest, uint64_t max_bytes = uint64_t{256} << 20);
  // Reads from `offset` on; what comes before is hashed too. OUT_OF_RANGE when offset > size.
  StatusOr<std::unique_ptr<Reader>> OpenReader(const std::string& digest, uint64_t offset);

  struct Swept {
    uint64_t candidates = 0;  // that wait for their grace to end
    uint64_t deleted = 0;
    uint64_t deleted_bytes = 0;
  };
  // One pass of the collection: of the blobs that `is_live` does not know, those that became candidates `grace` before `now` or
  // earlier are deleted, and so are uploads that nobody went on with for that long. `is_live` must know every blob that was
  // referred to when the pass began; references made since are safe, because they are made by asking for the blob.
  // One pass at a time. `now` is a steady clock's.
  StatusOr<Swept> Sweep(const std::function<bool(const std::string& digest)>& is_live, std::chrono::milliseconds now,
                        std::chrono::milliseconds grace);

  StatusOr<DiskSpace> Space() const { return options_.space_of(state_); }
  uint64_t total_bytes() const { return total_bytes_; }
  uint64_t total_blobs() const { return total_blobs_; }

 private:
  BlobStore(std::filesystem::path state, BlobStoreOptions options) : state_(std::move(state)), options_(std::move(options)) {}
  std::filesystem::path BlobPath(const std::string& digest) const;
  std::filesystem::path PartialPath(const std::string& digest, const std::string& scope) const;
  Status CheckSpace(uint64_t bytes) const;
  // Someone wants this blob: it is no candidate any more.
  void Claim(const std::string& digest) const;
  uint64_t SweepPartials(std::chrono::milliseconds grace);
  // Moves a complete, synced partial file to its name.
  Status Publish(const std::filesystem::path& from, const std::string& digest, uint64_t size);
  void Quarantine(const std::string& digest, uint64_t size);

  const std::filesystem::path state_;
  const BlobStoreOptions options_;
  mutable std::mutex candidates_mutex_;  // held while a blob is deleted: it is either claimed before or gone for the claimer
  mutable std::map<std::string, std::chrono::milliseconds> candidates_;  // digest -> since when
  std::atomic<uint64_t> total_bytes_{0};
  std::atomic<uint64_t> total_blobs_{0};
  // Which upload of a digest may write: the one with the newest ticket. Held during each write, so that a taken-over upload
  // has ended its last write before the new one begins.
  struct Ticket {
    std::mutex mutex;
    uint64_t newest = 0;
  };
  std::shared_ptr<Ticket> TicketOf(const std::string& partial);
  std::mutex tickets_mutex_;
  std::map<std::string, std::weak_ptr<Ticket>> tickets_;
};

class BlobStore::Upload {
 public:
  ~Upload();
  // Appends. OUT_OF_RANGE when more than the announced size comes; ABORTED when another upload took over.
  Status Write(uint64_t offset, std::string_view bytes);
  // Hashes, syncs and publishes. When the bytes do not have the digest they are dropped: INVALID_ARGUMENT, or ABORTED (start
  // again) when the first part was here from an earlier upload.
  Status Finish();
  uint64_t committed() const { return committed_; }

 private:
  friend class BlobStore;
  Upload(BlobStore* store, std::string digest, std::filesystem::path path, uint64_t size)
      : store_(store), digest_(std::move(digest)), path_(std::move(path)), size_(size) {}
  BlobStore* const store_;
  const std::string digest_;
  const std::filesystem::path path_;
  const uint64_t size_;
  std::shared_ptr<Ticket> ticket_;
  uint64_t number_ = 0;
  bool resumed_ = false;
  int fd_ = -1;
  uint64_t committed_ = 0;
  Sha256 hash_;
};

class BlobStore::Reader {
 public:
  ~Reader();
  // The next at most `max_bytes` bytes; empty at the end. DATA_LOSS instead of the end when the blob was damaged.
  StatusOr<std::string> Read(size_t max_bytes);
  uint64_t size() const { return size_; }

 private:
  friend class BlobStore;
  Reader(BlobStore* store, std::string digest, int fd, uint64_t size)
      : store_(store), digest_(std::move(digest)), fd_(fd), size_(size) {}
  BlobStore* const store_;
  const std::string digest_;
  const int fd_;
  const uint64_t size_;
  uint64_t position_ = 0;
  bool finished_ = false;
  Sha256 hash_;
};

}  // namespace refinery::store
