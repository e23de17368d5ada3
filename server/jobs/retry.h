// server/jobs/retry.h
//
// Which failures are tried again. Decided by class alone, never by text; a worker that names no class is judged by its status
// code.
//
//   INFRA     the attempt was lost, not wrong     again, up to 20 times, later each time
//   NODE      the machine is at fault             again elsewhere, up to 2 times
//   RESOURCE  out of memory or disk               again, elsewhere where possible, up to 2 times
//   POISON    the attempt died without a word     again until the third time, then the task is DEAD
//   NUMERIC   the training diverged               never: for `train` it is a result, elsewhere the task is DEAD
//   USER, BUG                                     never

#pragma once

#include <chrono>

#include "refinery/v1/task.pb.h"
#include "server/jobs/state.h"

namespace refinery::jobs {

inline constexpr uint32_t kMaxInfraFailures = 20;
inline constexpr uint32_t kMaxNodeFailures = 2;
inline constexpr uint32_t kMaxResourceFailures = 2;
inline constexpr uint32_t kMaxCrashes = 3;
inline constexpr uint32_t kMaxLosses = 5;  // of what one task made, each of which makes it run again

// The class of `error`, derived from its code when it names none.
v1::FailureClass ClassOf(const v1::TaskError& error);

// Whether `task` may run again after one more failure of `failure_class`.
bool MayRetry(const TaskState& task, v1::FailureClass failure_class);

// How long to wait before the next attempt, given `failures` of the kind so far (at least 1): base, doubled each time, at most
// 60 times base.
std::chrono::milliseconds Backoff(uint32_t failures, std::chrono::milliseconds base);

}  // namespace refinery::jobs
