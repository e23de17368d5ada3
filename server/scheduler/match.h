// server/scheduler/match.h
//
// Whether a worker has what a task needs. Pure.

#pragma once

#include <string>

#include "refinery/v1/job_service.pb.h"

namespace refinery::scheduler {

// What of a worker is taken by its leases.
struct Used {
  uint32_t devices = 0;
  uint64_t memory_bytes = 0;
};

// Whether `worker` could ever run the task: with everything of it free.
bool CanEver(const v1::WorkerInfo* worker, const v1::Requirements& needs);
// Whether it can now, besides what it runs.
bool CanNow(const v1::WorkerInfo* worker, const Used& used, const v1::Requirements& needs);

// "2 devices H200 with 80 GiB each, 64 GiB memory, label zone=a"; "any worker" when nothing is asked for.
std::string Describe(const v1::Requirements& needs);

}  // namespace refinery::scheduler
