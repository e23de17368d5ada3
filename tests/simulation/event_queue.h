// tests/simulation/event_queue.h
//
// Simulated time: actions in the order of their times; those of one time in the order in which they were asked for.

#pragma once

#include <functional>
#include <queue>
#include <utility>
#include <vector>

#include "tests/simulation/options.h"

namespace refinery::simulation {

class EventQueue {
 public:
  using Action = std::function<void()>;

  Time now() const { return now_; }
  void After(Time delay, Action action) { heap_.push({now_ + delay, next_++, std::move(action)}); }
  // Runs the next action; false when there is none.
  bool RunNext() {
    if (heap_.empty()) return false;
    // The element is dropped at once, so its action may be moved out of it.
    Item item = std::move(const_cast<Item&>(heap_.top()));
    heap_.pop();
    now_ = item.time;
    item.action();
    return true;
  }

 private:
  struct Item {
    Time time;
    uint64_t order;
    Action action;
    bool operator<(const Item& other) const { return std::pair(time, order) > std::pair(other.time, other.order); }
  };
  std::priority_queue<Item> heap_;
  Time now_ = 0;
  uint64_t next_ = 0;
};

}  // namespace refinery::simulation
