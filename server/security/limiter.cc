#include "server/security/limiter.h"

#include <algorithm>

#include "common/error_details.h"

namespace refinery::security {
namespace {

constexpr std::chrono::milliseconds kBusyRetry{1'000};
constexpr std::chrono::seconds kClean{60};
constexpr int64_t kCall = 1'000'000'000;  // the credit of one

}  // namespace

Status Limiter::Begin(const std::string& caller, Clock::time_point now) {
  if (limits_.rate_per_second == 0 && limits_.concurrent_calls == 0) return absl::OkStatus();
  std::lock_guard lock(mutex_);
  ForgetQuietOnes(now);
  const int64_t rate = limits_.rate_per_second, burst = 2 * rate * kCall;
  const auto [it, is_new] = callers_.try_emplace(caller, Caller{.credit = burst, .filled = now});
  Caller& state = it->second;
  if (limits_.concurrent_calls > 0 && state.running >= limits_.concurrent_calls) {
    return WithRetryAfter(WithReason(ResourceExhausted(caller, " has ", state.running, " calls running; at most ",
                                                       limits_.concurrent_calls, " may (concurrent_calls)"),
                                     "TOO_MANY_CALLS"),
                          kBusyRetry);
  }
  if (rate > 0) {
    // Two seconds fill the bucket; more would only overflow the product.
    const std::chrono::nanoseconds elapsed = std::clamp<std::chrono::nanoseconds>(now - state.filled, {}, std::chrono::seconds(2));
    state.credit = std::min(burst, state.credit + elapsed.count() * rate);
    state.filled = now;
    if (state.credit < kCall) {
      const auto wait = std::chrono::ceil<std::chrono::milliseconds>(std::chrono::nanoseconds((kCall - state.credit + rate - 1) / rate));
      return WithRetryAfter(WithReason(ResourceExhausted(caller, " makes more than ", limits_.rate_per_second,
                                                         " calls a second (rate_per_second)"),
                                       "RATE_LIMITED"),
                            wait);
    }
    state.credit -= kCall;
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
