// server/store/attempt_logs.h
//
// What attempts wrote on their standard error: <state>/logs/<job>/<path with / as __>/<attempt>.log, at most
// limits::kMaxLogBytesPerAttempt each. Logs are for people: they are not synced and a lost part is no error.
//
// Threads: one at a time.

#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "common/status.h"

namespace refinery::store {

class AttemptLogs {
 public:
  explicit AttemptLogs(std::filesystem::path state) : folder_(std::move(state) / "logs") {}

  // Adds `text`, whose first byte stands at `offset` of the attempt's log. Bytes that are here already are skipped, so a
  // repeated call adds nothing; a gap (the worker dropped text) is filled with a line that says so.
  Status Append(const std::string& job, const std::string& path, uint32_t attempt, uint64_t offset, std::string_view text);

  struct Size {
    std::string path;
    uint32_t attempt = 0;
    uint64_t bytes = 0;
  };
  // The logs of a job in the order (path, attempt).
  std::vector<Size> List(const std::string& job);

  // At most `max_bytes` from `offset` on; empty at the end or when there is no such log.
  StatusOr<std::string> Read(const std::string& job, const std::string& path, uint32_t attempt, uint64_t offset,
                             size_t max_bytes) const;

 private:
  using Sizes = std::map<std::pair<std::string, uint32_t>, uint64_t>;
  std::filesystem::path File(const std::string& job, const std::string& path, uint32_t attempt) const;
  Sizes& SizesOf(const std::string& job);

  const std::filesystem::path folder_;
  std::map<std::string, Sizes> sizes_;  // of the jobs that were asked about
};

}  // namespace refinery::store
