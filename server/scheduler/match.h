// server/scheduler/match.h
//
// Whether a worker has what a task needs. Pure.

#pragma once

#include <string>
#include <vector>

#include "refinery/v1/job_service.pb.h"

namespace refinery::scheduler {

// What of a worker is taken by its leases.
struct Used {
  uint64_t devices = 0;
  uint64_t memory_bytes = 0;
};

// Whether `worker` could ever run the task: with everything of it free.
bool CanEver(const v1::WorkerInfo* worker, const v1::Requirements& needs);
// Whether it can now, besides what it runs.
bool CanNow(const v1::WorkerInfo* worker, const Used& used, const v1::Requirements& needs);

// How many tasks that need this it could run at once with everything of it free, when it takes at most `slots`.
uint64_t MostAtOnce(const v1::WorkerInfo* worker, const v1::Requirements& needs, uint64_t slots);

// Whether it has devices beside its processor. Those of `Requirements.devices` are meant, unless that names "cpu".
bool HasAccelerators(const v1::WorkerInfo* worker);
bool NeedsAccelerators(const v1::Requirements& needs);

// Why none of the workers could ever run the task, in numbers: for each thing asked for that some lack how many do, and what the
// best of them has. "2 of them have too few devices (at most 1), 1 lacks the label zone=a". Null stands for a worker of which
// nothing is known.
std::string WhyNone(const std::vector<const v1::WorkerInfo*>& workers, const v1::Requirements& needs);

// "2 devices H200 with 80 GiB each, 64 GiB memory, label zone=a"; "any worker" when nothing is asked for.
std::string Describe(const v1::Requirements& needs);

}  // namespace refinery::scheduler
