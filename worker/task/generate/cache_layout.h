// worker/task/generate/cache_layout.h
//
// How many sequences of what length the key-value cache has room for within a budget of bytes.
//
// Threads: pure functions.

#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace refinery::generate {

struct CacheLayout {
  int64_t slots = 0, capacity = 0;  // sequences, and positions of each
};

struct CacheLimits {
  int64_t max_slots = 1;
  int64_t min_capacity = 0;         // where the budget allows it for all slots
  int64_t budget = 0;               // bytes; 0 = no bound
  std::function<int64_t(int64_t slots, int64_t capacity)> bytes;
};

// Whether a sequence of that many positions fits into the budget at all.
bool CanFit(const CacheLimits& limits, int64_t positions);

// The layout for the waiting requests, of which `needs` are the positions, first come first: the first one fits, and so do all
// others that leave room for max_slots of their kind. One that is longer gets its layout when it is the first. Not empty; the
// first must fit (CanFit).
CacheLayout ChooseLayout(const CacheLimits& limits, const std::vector<int64_t>& needs);

}  // namespace refinery::generate
