// server/scheduler/schedule.h
//
// One scheduling pass: ready tasks x workers with free slots -> grants. Pure; the order of its inputs is its only priority:
// tasks come oldest job first and in the plan's order, so a job's imports run before anything that waits for them.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "server/jobs/core.h"

namespace refinery::scheduler {

struct FreeWorker {
  std::string id;
  uint32_t free_slots = 0;
};

struct Decision {
  std::string job;
  std::string path;
  std::string worker;
};

// Each task goes to a worker that ran tasks of its job before (its inputs lie there already), else to the one with the most
// free slots; ties go to the lower id. A worker that the task avoids gets it only when `live_workers` names no other.
std::vector<Decision> Schedule(const std::vector<jobs::Core::ReadyTask>& tasks, std::vector<FreeWorker> workers,
                               const std::vector<std::string>& live_workers);

}  // namespace refinery::scheduler
