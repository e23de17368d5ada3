// server/api/list.h
//
// ListJobs: which jobs, in which order, from where on. A page token names the last job shown by the values it was ordered by, so
// jobs that come or go between two pages neither shift nor repeat the others. It is signed with a key of the state folder and
// bound to filter, order, tenant and caller.
//
// Errors: INVALID_ARGUMENT with the field.  Threads: the coordinator's loop.

#pragma once

#include <filesystem>
#include <string>

#include "common/status.h"
#include "refinery/v1/job_service.pb.h"
#include "server/jobs/state.h"
#include "server/security/gate.h"

namespace refinery::api {

// 32 random bytes that stay with the state folder; made at the first start, readable by the owner only.
StatusOr<std::string> LoadPageKey(const std::filesystem::path& state);

Status ListJobs(const jobs::State& state, const security::Principal& principal, const v1::ListJobsRequest& request,
                const std::string& page_key, const jobs::Now& now, v1::ListJobsResponse* response);

}  // namespace refinery::api
