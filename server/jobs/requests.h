// server/jobs/requests.h
//
// The calls with a request id that were answered. A call that is repeated because its answer was lost must not act twice: a late
// second "pause" must not undo the "resume" in between. The marks lie in the events that the calls made, so a restarted
// coordinator knows them too; the oldest are forgotten, by number and by age, as a function of the log alone.
//
// Errors: none.  Threads: part of the state.

#pragma once

#include <cstdint>
#include <deque>
#include <string>
#include <unordered_map>

namespace refinery::jobs {

class AnsweredRequests {
 public:
  static constexpr size_t kMaxRequests = 100'000;
  static constexpr int64_t kMaxAgeMs = int64_t{7} * 24 * 3600 * 1000;

  struct Entry {
    std::string digest;   // of the call
    int64_t time_ms = 0;  // of its event
  };
  // Null when there was no such call, or it was forgotten.
  const Entry* Find(const std::string& key) const {
    const auto found = by_key_.find(key);
    return found == by_key_.end() ? nullptr : &found->second;
  }
  // A known key stays as it is.
  void Add(const std::string& key, const std::string& digest, int64_t time_ms) {
    if (by_key_.try_emplace(key, Entry{digest, time_ms}).second) order_.push_back(key);
    while (order_.size() > kMaxRequests || (!order_.empty() && by_key_.at(order_.front()).time_ms < time_ms - kMaxAgeMs)) {
      by_key_.erase(order_.front());
      order_.pop_front();
    }
  }
  // Keys, oldest first.
  const std::deque<std::string>& order() const { return order_; }

 private:
  std::unordered_map<std::string, Entry> by_key_;
  std::deque<std::string> order_;
};

}  // namespace refinery::jobs
