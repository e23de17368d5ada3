// worker/task/checkpoint/mapped_file.h
//
// A whole file mapped read-only into memory. The mapping lives as long as the object; share it with std::shared_ptr.
// Errors: NOT_FOUND, UNAVAILABLE, naming the file.  Threads: reading is thread-safe.

#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string_view>

#include "common/status.h"

namespace refinery::checkpoint {

class MappedFile {
 public:
  static StatusOr<std::shared_ptr<const MappedFile>> Open(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::filesystem::path& path() const { return path_; }
  const uint8_t* data() const { return data_; }
  uint64_t size() const { return size_; }
  // Bytes [begin, end); the caller has checked begin <= end <= size().
  std::string_view Bytes(uint64_t begin, uint64_t end) const {
    return {reinterpret_cast<const char*>(data_) + begin, static_cast<size_t>(end - begin)};
  }
  // Gives the pages of bytes [begin, end) back to the kernel's page cache, so that they count in no resident memory. Reading them
  // again maps them again.
  void Release(uint64_t begin, uint64_t end) const;

 private:
  MappedFile() = default;
  std::filesystem::path path_;
  const uint8_t* data_ = nullptr;
  uint64_t size_ = 0;
};

}  // namespace refinery::checkpoint
