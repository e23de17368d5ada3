// worker/task/checkpoint/atomic_file.h
//
// A file of a size known beforehand, written part by part: it appears under its name, synced to disk, in Finish; without it
// nothing is left behind.
//
// Errors: RESOURCE_EXHAUSTED on a full disk, UNAVAILABLE, INTERNAL when more or fewer bytes come than were announced.
// Threads: one.

#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string_view>

#include "common/status.h"

namespace refinery::checkpoint {

class AtomicFile {
 public:
  // Creates missing folders. `size` bytes must follow.
  static StatusOr<std::unique_ptr<AtomicFile>> Create(const std::filesystem::path& path, uint64_t size);
  ~AtomicFile();
  AtomicFile(const AtomicFile&) = delete;
  AtomicFile& operator=(const AtomicFile&) = delete;

  Status Append(std::string_view bytes);
  Status Finish();

 private:
  AtomicFile() = default;
  std::filesystem::path path_;
  std::filesystem::path temporary_;
  int fd_ = -1;
  uint64_t missing_ = 0;  // bytes still to come
};

}  // namespace refinery::checkpoint
