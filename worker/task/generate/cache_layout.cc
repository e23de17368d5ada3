#include "worker/task/generate/cache_layout.h"

#include <algorithm>

namespace refinery::generate {
namespace {

bool Fits(const CacheLimits& limits, int64_t slots, int64_t capacity) {
  return limits.budget <= 0 || limits.bytes(slots, capacity) <= limits.budget;
}

}  // namespace

bool CanFit(const CacheLimits& limits, int64_t positions) { return Fits(limits, 1, positions); }

CacheLayout ChooseLayout(const CacheLimits& limits, const std::vector<int64_t>& needs) {
  int64_t capacity = needs.front();
  for (const int64_t need : needs) {
    if (need > capacity && Fits(limits, limits.max_slots, need)) capacity = need;
  }
  if (limits.min_capacity > capacity && Fits(limits, limits.max_slots, limits.min_capacity)) capacity = limits.min_capacity;
  int64_t slots = limits.max_slots;
  while (slots > 1 && !Fits(limits, slots, capacity)) --slots;
  return {slots, capacity};
}

}  // namespace refinery::generate
