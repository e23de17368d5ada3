// server/api/visible.h
//
// Jobs as a caller may see them: those of other tenants do not exist for him, not even as a prefix that would be ambiguous.
//
// Threads: the coordinator's loop.

#pragma once

#include <string>

#include "common/status.h"
#include "refinery/v1/job_service.pb.h"
#include "server/jobs/state.h"
#include "server/security/gate.h"

namespace refinery::api {

// "default" for a job that names none.
std::string TenantOf(const jobs::JobState& job);
// "tenants/<tenant>/jobs/<id>"
std::string NameOf(const jobs::JobState& job);
// Changes with each of the job's events.
std::string EtagOf(const jobs::JobState& job);

// `name` is an id, a unique beginning of one, or a full name. NOT_FOUND; INVALID_ARGUMENT for an empty or ambiguous one.
StatusOr<const jobs::JobState*> FindJob(const jobs::State& state, const security::Principal& principal, const std::string& name);

// The job as the API shows it.
v1::Job ShowJob(const jobs::JobState& job, bool with_tasks, const jobs::Now& now);

}  // namespace refinery::api
