// client/commands/result.h
//
// What a finished job leaves behind, brought to this machine.

#pragma once

#include <filesystem>
#include <string>

#include "client/globals.h"
#include "common/status.h"

namespace refinery::client {

// Downloads the job's artifact, or the best adapter of a job that has none, and its report to <folder>/artifact, <folder>/best and
// <folder>/report; what is there already stays. FAILED_PRECONDITION when the job has none of them.
Status FetchResult(Connection& connection, const v1::Job& job, const std::filesystem::path& folder);
// The summary table of the job's report.
StatusOr<std::string> ReportTable(Connection& connection, const v1::Job& job);
// "; `refinery fetch J` brings the best adapter it came to" when there is one.
std::string BestText(const v1::Job& job);
// Why a job did not succeed, in one sentence, with the next step.
std::string FailureText(const v1::Job& job);

}  // namespace refinery::client
