// common/limits.h
//
// Every bound of the system in one place: message sizes, queues, waits.

#pragma once

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>

namespace refinery::limits {

inline constexpr size_t kMaxMessageBytes = 8 << 20;          // gRPC receive limit, both directions
inline constexpr size_t kBlobChunkBytes = 512 << 10;         // one WriteBlob / ReadBlob message
inline constexpr size_t kMaxRecipeBytes = 256 << 10;
inline constexpr size_t kMaxLogChunkBytes = 64 << 10;        // log text in one Synchronize
inline constexpr size_t kMaxLogBytesPerAttempt = 64 << 20;
inline constexpr size_t kMaxTasksPerJob = 20'000;
inline constexpr size_t kMaxErrorBytes = 4096;
inline constexpr size_t kMaxWorkerLabels = 64;
inline constexpr size_t kMaxReportedArtifacts = 256;         // of a worker's cache, in Synchronize

inline constexpr std::chrono::milliseconds kLeaseTtl{30'000};
inline constexpr std::chrono::milliseconds kSynchronizeInterval{1'000};  // while busy
// Often enough that two lost calls in a row do not cost a lease of this life.
constexpr std::chrono::milliseconds SynchronizeInterval(std::chrono::milliseconds lease_ttl) {
  return std::min(kSynchronizeInterval, lease_ttl / 4);
}
// A worker ends its attempts this long before their leases, which it counts from when it sent the call that renewed them.
constexpr std::chrono::milliseconds FenceMargin(std::chrono::milliseconds lease_ttl) {
  return std::min(std::chrono::milliseconds(5'000), lease_ttl / 4);
}
inline constexpr std::chrono::milliseconds kLongPoll{20'000};            // while idle
inline constexpr std::chrono::milliseconds kRpcDeadline{30'000};
inline constexpr std::chrono::milliseconds kWatchHeartbeat{15'000};

inline constexpr uint32_t kProtocolVersion = 1;

}  // namespace refinery::limits
