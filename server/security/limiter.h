// server/security/limiter.h
//
// How much one caller may ask for: a token bucket for calls per second (twice the rate may come in a burst) and a count of calls
// that run at the same time. Keeps nothing of callers who have been quiet.
//
// Errors: RESOURCE_EXHAUSTED with the reason RATE_LIMITED or TOO_MANY_CALLS and the time after which to try again.
// Threads: any.

#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <mutex>
#include <string>

#include "common/status.h"

namespace refinery::security {

struct Limits {
  uint32_t rate_per_second = 0;   // 0 = no limit
  uint32_t concurrent_calls = 0;  // 0 = no limit
};

class Limiter {
 public:
  using Clock = std::chrono::steady_clock;

  explicit Limiter(Limits limits) : limits_(limits) {}

  // Each OK is followed by one End.
  Status Begin(const std::string& caller, Clock::time_point now);
  void End(const std::string& caller);

 private:
  struct Caller {
    int64_t credit = 0;  // in billionths of a call, so that nothing is lost to rounding
    Clock::time_point filled;
    uint32_t running = 0;
  };
  void ForgetQuietOnes(Clock::time_point now);

  const Limits limits_;
  std::mutex mutex_;
  std::map<std::string, Caller> callers_;
  Clock::time_point cleaned_;
};

}  // namespace refinery::security
