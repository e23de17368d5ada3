#include "worker/agent/coordinator_calls.h"

#include <algorithm>
#include <chrono>
#include <thread>

#include "common/grpc_status.h"
#include "common/limits.h"
#include "refinery/v1/worker_service.grpc.pb.h"

namespace refinery::agent {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kFirstBackoff{100};
constexpr milliseconds kLongestBackoff{3'000};
constexpr milliseconds kPoll{50};

template <typename Call>
Status Repeat(const Call& call, const std::function<bool()>& cancelled) {
  milliseconds backoff = kFirstBackoff;
  while (true) {
    if (cancelled()) return Cancelled("given up");
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + limits::kRpcDeadline);
    Status status = FromGrpc(call(&context));
    if (!IsTransient(status)) return status;
    for (milliseconds waited{0}; waited < backoff && !cancelled(); waited += kPoll) std::this_thread::sleep_for(kPoll);
    backoff = std::min(backoff * 2, kLongestBackoff);
  }
}

}  // namespace

bool IsTransient(const Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kUnknown:
      return true;
    default:
      return false;
  }
}

Status CompleteTask(const std::shared_ptr<grpc::Channel>& channel, const v1::CompleteTaskRequest& request,
                    const std::function<bool()>& cancelled) {
  auto stub = v1::WorkerService::NewStub(channel);
  return Repeat(
      [&](grpc::ClientContext* context) {
        v1::CompleteTaskResponse response;
        return stub->CompleteTask(context, request, &response);
      },
      cancelled);
}

Status CommitCheckpoint(const std::shared_ptr<grpc::Channel>& channel, const v1::CommitCheckpointRequest& request,
                        const std::function<bool()>& cancelled) {
  auto stub = v1::WorkerService::NewStub(channel);
  return Repeat(
      [&](grpc::ClientContext* context) {
        v1::CommitCheckpointResponse response;
        return stub->CommitCheckpoint(context, request, &response);
      },
      cancelled);
}

}  // namespace refinery::agent
