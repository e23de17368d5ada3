// worker/agent/artifact_cache.h
//
// Artifacts on a worker's disk, by digest: <folder>/<hex>/. A folder there is complete, checked and never changed, so that
// attempts can link to it. Workers of one machine may share the cache; a file lock per digest lets one of them download.
//
// Errors: those of ArtifactClient.  Threads: safe for any.

#pragma once

#include <chrono>
#include <filesystem>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "common/artifact_client.h"
#include "common/status.h"

namespace refinery::agent {

class ArtifactCache {
 public:
  explicit ArtifactCache(std::filesystem::path folder);

  // Where the artifact lies, brought by `client` if it is not here. CANCELLED when `cancelled` says so while another
  // process downloads it.
  StatusOr<std::filesystem::path> Fetch(const std::string& digest, ArtifactClient& client,
                                        const std::function<bool()>& cancelled);
  // Moves a folder that is known to have this digest into the cache; it may stay where it is if that fails.
  void Adopt(const std::string& digest, const std::filesystem::path& folder);
  // Digests of at most `limit` artifacts that lie here, the last used first (by this process, or else the last that came). What
  // other workers bring or people remove is seen within half a minute.
  std::vector<std::string> Newest(size_t limit);

 private:
  using Time = std::filesystem::file_time_type;
  void Used(const std::string& hex);
  void Scan();

  const std::filesystem::path folder_;
  std::mutex mutex_;                                      // guards what follows
  std::map<std::string, Time> used_;                      // by hex
  std::chrono::steady_clock::time_point next_scan_{};
};

}  // namespace refinery::agent
