// server/api/diff.h
//
// Why a job ran again what another had done: task by task, the identities of two jobs and what made them differ. Pure.
//
// Threads: no shared state.

#pragma once

#include "refinery/v1/job_service.pb.h"
#include "server/jobs/state.h"

namespace refinery::api {

// Tasks are matched by path. A cause is a field of the parameters, the seed, or an input whose bytes differ (with the task that made
// it, so that a chain of changes can be followed to its first link); without any, the code version.
v1::JobDiff DiffJobs(const jobs::JobState& before, const jobs::JobState& after);

}  // namespace refinery::api
