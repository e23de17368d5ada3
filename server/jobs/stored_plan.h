// server/jobs/stored_plan.h
//
// A plan as the log keeps it (JobCreated.plan): a StoredPlan, gzipped, because its tasks resemble each other. So a log can be
// replayed by a program that would plan the recipe differently.
//
// Errors: DATA_LOSS for damaged bytes.

#pragma once

#include <string>

#include "common/status.h"
#include "server/plan/plan.h"

namespace refinery::jobs {

std::string PackPlan(const plan::Plan& plan);
StatusOr<plan::Plan> UnpackPlan(const std::string& bytes);

}  // namespace refinery::jobs
