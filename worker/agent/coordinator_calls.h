// worker/agent/coordinator_calls.h
//
// The two calls that end or secure an attempt's work. Both are repeated until the coordinator has answered for good: it may be
// restarting, and what they report must not be lost. Repeating is harmless, the lease's epoch and the digest decide.
//
// Returns OK, ABORTED (stale lease: the task belongs to someone else now), CANCELLED when `cancelled` says so, or another
// refusal that trying again would not change.  Threads: safe for any.

#pragma once

#include <functional>
#include <memory>

#include <grpcpp/channel.h>

#include "common/status.h"
#include "refinery/v1/worker_service.pb.h"

namespace refinery::agent {

Status CompleteTask(const std::shared_ptr<grpc::Channel>& channel, const v1::CompleteTaskRequest& request,
                    const std::function<bool()>& cancelled);
Status CommitCheckpoint(const std::shared_ptr<grpc::Channel>& channel, const v1::CommitCheckpointRequest& request,
                        const std::function<bool()>& cancelled);

// Whether a call with this outcome may be repeated unchanged.
bool IsTransient(const Status& status);

}  // namespace refinery::agent
