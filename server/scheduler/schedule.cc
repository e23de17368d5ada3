#include "server/scheduler/schedule.h"

#include <algorithm>
#include <tuple>

namespace refinery::scheduler {

std::vector<Decision> Schedule(const std::vector<jobs::Core::ReadyTask>& tasks, std::vector<FreeWorker> workers,
                               const std::vector<std::string>& live_workers) {
  std::vector<Decision> decisions;
  for (const jobs::Core::ReadyTask& task : tasks) {
    const bool can_choose = std::any_of(live_workers.begin(), live_workers.end(),
                                        [&](const std::string& id) { return !task.avoid.contains(id); });
    FreeWorker* best = nullptr;
    const auto rank = [&](const FreeWorker& worker) {  // smaller is better
      return std::make_tuple(!task.worked.contains(worker.id), -static_cast<int64_t>(worker.free_slots), worker.id);
    };
    for (FreeWorker& worker : workers) {
      if (worker.free_slots == 0 || (can_choose && task.avoid.contains(worker.id))) continue;
      if (best == nullptr || rank(worker) < rank(*best)) best = &worker;
    }
    if (best == nullptr) continue;
    --best->free_slots;
    decisions.push_back({.job = task.job, .path = task.path, .worker = best->id});
  }
  return decisions;
}

}  // namespace refinery::scheduler
