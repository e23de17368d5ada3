// server/scheduler/schedule.h
//
// One scheduling pass: the queues of the core x the living workers -> grants and preemptions. Pure: a function of its arguments
// alone. It looks at as many tasks as it can place, not at all that wait.
//
//   order        priority; among equals the tenant with the smallest share (running leases / weight); its oldest job; the plan's
//                order. Quotas count the live leases, never a counter of their own.
//   place        a worker that has what the task needs (match.h): first one that holds most of its inputs, then one that ran
//                tasks of its job, then the one with the most free slots, then the lowest id. A worker that the task avoids gets
//                it only when no other that could ever take it lives.
//   gangs        all members or none, so many as their kind asks for; the last ones of a job may be fewer, but none starts while
//                others of the kind wait for their next attempt. Smaller tasks fill in until a gang has waited `gang_patience`, then the workers
//                that fit it take nothing else, unless all of them together have too few slots for it.
//   preemption   for a task that no free worker can take: leases of strictly lower priority, on workers that fit, the lowest
//                priority and the last that became ready first; taken back at their next checkpoint. Strictly lower, so no two jobs can
//                push each other out in turn.

#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "server/jobs/core.h"

namespace refinery::scheduler {

// A living worker. The strings belong to the caller.
struct Worker {
  std::string_view id;
  uint32_t free_slots = 0;                // 0: busy, or it does not wait for work right now
  const v1::WorkerInfo* info = nullptr;   // null: nothing is known of it
  bool draining = false;
  uint32_t slots = 0;                     // attempts that it takes at once, as it said last; 0: not known
};

struct Decision {
  std::string job;
  std::string path;
  std::string worker;  // of a preemption: who runs it
  uint32_t gang = 0;   // grants of one pass with the same number start together or not at all; 0 = alone
};

struct Pass {
  std::vector<Decision> grants;
  std::vector<Decision> preemptions;
};

struct ScheduleOptions {
  std::chrono::milliseconds gang_patience{600'000};
  size_t max_grants = 1024;
};

Pass Schedule(const jobs::Core& core, const std::vector<Worker>& workers, const jobs::Now& now,
              const ScheduleOptions& options = {});

// Why a task does not run, with numbers, for `refinery why`; reason unspecified and no text for one that does not wait.
struct Wait {
  v1::WaitReason reason = v1::WAIT_REASON_UNSPECIFIED;
  std::string text;
};
Wait Explain(const jobs::Core& core, const jobs::JobState& job, size_t task, const std::vector<Worker>& workers,
             const jobs::Now& now);

// How many tasks that need this the workers could run at once with nothing else to do.
uint64_t RoomFor(const jobs::State& state, const std::vector<Worker>& workers, const v1::Requirements& needs);

// What the tenants' live leases take, by tenant.
struct Usage {
  uint32_t leases = 0;
  uint64_t devices = 0;
};
std::map<std::string, Usage> UsageOf(const jobs::State& state);

}  // namespace refinery::scheduler
