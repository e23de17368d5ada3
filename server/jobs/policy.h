// server/jobs/policy.h
//
// Checks of how a job or a tenant may share the fleet.
//
// Errors: INVALID_ARGUMENT naming the field; RESOURCE_EXHAUSTED for a tenant that has as many jobs as it may.

#pragma once

#include "common/status.h"
#include "server/jobs/state.h"

namespace refinery::jobs {

inline constexpr int32_t kMaxPriority = 1000;
inline constexpr double kMaxWeight = 1e6;

Status CheckPolicy(const v1::JobPolicy& policy);
Status CheckTenant(const v1::TenantPolicy& policy);
// Whether the tenant may have one more job.
Status CheckJobQuota(const State& state, const v1::JobPolicy& policy);

// Whether the job is in a state from which it can be paused, resumed, retried; also when it is there already. FAILED_PRECONDITION says
// what to do instead.
Status CheckPause(const JobState& job);
Status CheckResume(const JobState& job);
Status CheckRetry(const JobState& job);

}  // namespace refinery::jobs
