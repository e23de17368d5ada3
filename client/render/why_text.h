// client/render/why_text.h
//
// Answers to "why": why a job waits, is slow or failed, and why tasks of a job ran again. Pure: everything comes in as messages.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "refinery/v1/job_service.pb.h"

namespace refinery::client {

// One paragraph with numbers: state and age, what is done, what the longest waiting task waits for and since when, what runs and
// whether it takes longer than its like, attempts that failed by class, and the next step. `events` are the job's (none: times are
// left out), `now_ms` is the coordinator's clock.
std::string WhyText(const v1::Job& job, const std::vector<v1::Event>& events, const v1::ListWorkersResponse& workers, int64_t now_ms);

// A line that counts the tasks by what became of them, then a line for each that changed, with the fields or inputs that did.
std::string DiffText(const v1::JobDiff& diff);

}  // namespace refinery::client
