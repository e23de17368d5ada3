// server/api/job_files.h
//
// Checks the artifacts that a new job names as its files.
//
// Errors: INVALID_ARGUMENT for what is no digest, for too many or too large manifests; FAILED_PRECONDITION naming the first blob that the
// caller's tenant lacks.
// Threads: the coordinator's loop; it reads each manifest there, so their bytes are bounded.

#pragma once

#include <string>

#include "common/status.h"
#include "server/api/coordinator.h"

namespace refinery::api {

// `files` are role -> digest; `tenant` is the caller's, empty for one that sees all.
Status CheckFiles(const jobs::State& state, Coordinator& coordinator, const std::string& tenant,
                  const google::protobuf::Map<std::string, std::string>& files);

}  // namespace refinery::api
