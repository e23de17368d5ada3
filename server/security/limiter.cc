#include "server/security/limiter.h"

#include <algorithm>
#include <cmath>

#include "common/error_details.h"

namespace refinery::security {
namespace {

constexpr std::chrono::milliseconds kBusyRetry{1'000};
constexpr std::chrono::seconds kClean{60};

}  // namespace

Status Limiter::Begin(const std::string& caller, Clock::time_point now) {
  if (limits_.rate_per_second == 0 && limits_.concurrent_calls == 0) return absl::OkStatus();
  std::lock_guard lock(mutex_);
  ForgetQuietOnes(now);
  const double rate = limits_.rate_per_second, burst = 2 * rate;
  const auto [it, is_new] = callers_.try_emplace(caller, Caller{.tokens = burst, .filled = now});
  Caller& state = it->second;
  if (limits_.concurrent_calls > 0 && state.running >= limits_.concurrent_calls) {
    return WithRetryAfter(WithReason(ResourceExhausted(caller, " has ", state.running, " calls running; at most ",
                                                       limits_.concurrent_calls, " may (concurrent_calls)"),
                                     "TOO_MANY_CALLS"),
                          kBusyRetry);
  }
  if (rate > 0) {
    const double elapsed = std::max(0.0, std::chrono::duration<double>(now - state.filled).count());
    state.tokens = std::min(burst, state.tokens + elapsed * rate);
    state.filled = now;
    if (state.tokens < 1) {
      const auto wait = std::chrono::milliseconds(static_cast<int64_t>(std::ceil((1 - state.tokens) / rate * 1000)));
      return WithRetryAfter(WithReason(ResourceExhausted(caller, " makes more than ", limits_.rate_per_second,
                                                         " calls a second (rate_per_second)"),
                                       "RATE_LIMITED"),
                            wait);
    }
    state.tokens -= 1;
  }
  ++state.running;
  return absl::OkStatus();
}

void Limiter::End(const std::string& caller) {
  if (limits_.rate_per_second == 0 && limits_.concurrent_calls == 0) return;
  std::lock_guard lock(mutex_);
  const auto found = callers_.find(caller);
  if (found != callers_.end() && found->second.running > 0) --found->second.running;
}

void Limiter::ForgetQuietOnes(Clock::time_point now) {
  if (now - cleaned_ < kClean) return;
  cleaned_ = now;
  std::erase_if(callers_, [&](const auto& entry) { return entry.second.running == 0 && now - entry.second.filled > kClean; });
}

}  // namespace refinery::security
