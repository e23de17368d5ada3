#include "server/jobs/retry.h"

#include <algorithm>

namespace refinery::jobs {

v1::FailureClass ClassOf(const v1::TaskError& error) {
  if (error.failure_class() != v1::FAILURE_CLASS_UNSPECIFIED) return error.failure_class();
  switch (static_cast<absl::StatusCode>(error.code())) {
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kCancelled:
    case absl::StatusCode::kDeadlineExceeded:
      return v1::INFRA;
    case absl::StatusCode::kDataLoss:
      return v1::NODE;
    case absl::StatusCode::kResourceExhausted:
      return v1::RESOURCE;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kPermissionDenied:
      return v1::USER;
    default:
      return v1::BUG;
  }
}

bool MayRetry(const TaskState& task, v1::FailureClass failure_class) {
  switch (failure_class) {
    case v1::INFRA: return task.infra_failures < kMaxInfraFailures;
    case v1::NODE: return task.node_failures < kMaxNodeFailures;
    case v1::RESOURCE: return task.resource_failures < kMaxResourceFailures;
    case v1::POISON: return task.crashes + 1 < kMaxCrashes;
    default: return false;
  }
}

std::chrono::milliseconds Backoff(uint32_t failures, std::chrono::milliseconds base) {
  const int64_t factor = int64_t{1} << std::min<uint32_t>(failures > 0 ? failures - 1 : 0, 6);
  return base * std::min<int64_t>(factor, 60);
}

}  // namespace refinery::jobs
