// server/api/filter.h
//
// `filter` and `order_by` of ListJobs (AIP-160 and AIP-132, as far as proto/refinery/v1/job_service.proto says):
//
//   state = RUNNING AND owner : "ann" AND (priority > 0 OR NOT name : "test")
//   priority desc, create_time_ms
//
// As in AIP-160, OR binds tighter than AND. Pure; the texts come from outside, so length, depth and number of terms are bounded.
//
// Errors: INVALID_ARGUMENT that says where and what would be right.  Threads: no shared state.

#pragma once

#include <functional>
#include <string>
#include <vector>

#include "common/status.h"
#include "server/jobs/state.h"

namespace refinery::api {

using JobPredicate = std::function<bool(const jobs::JobState&)>;

// An empty text lets every job through.
StatusOr<JobPredicate> ParseFilter(const std::string& text);

// One field of an order. Numbers compare as such, texts by bytes.
struct SortKey {
  std::string field;
  bool descending = false;
  bool is_number = false;
};
// At most four fields. Empty for an empty text.
StatusOr<std::vector<SortKey>> ParseOrder(const std::string& text);

// A job's values of the order's fields.
struct SortValue {
  double number = 0;
  std::string text;
};
std::vector<SortValue> SortValues(const jobs::JobState& job, const std::vector<SortKey>& order);
// Negative when `a` comes first, 0 when they are equal in every field.
int Compare(const std::vector<SortValue>& a, const std::vector<SortValue>& b, const std::vector<SortKey>& order);

}  // namespace refinery::api
