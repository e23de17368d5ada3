// server/api/worker_service.h
//
// WorkerService (proto/refinery/v1/worker_service.proto): leases out, results in. Synchronize is a long poll while the worker
// is idle; nothing waits in a thread for it.

#pragma once

#include "refinery/v1/worker_service.grpc.pb.h"
#include "server/api/coordinator.h"
#include "server/security/gate.h"

namespace refinery::api {

class WorkerServiceImpl final : public v1::WorkerService::CallbackService {
 public:
  WorkerServiceImpl(Coordinator* coordinator, security::Gate* gate) : coordinator_(coordinator), gate_(gate) {}

  grpc::ServerUnaryReactor* Synchronize(grpc::CallbackServerContext* context, const v1::SynchronizeRequest* request,
                                        v1::SynchronizeResponse* response) override;
  grpc::ServerUnaryReactor* CompleteTask(grpc::CallbackServerContext* context, const v1::CompleteTaskRequest* request,
                                         v1::CompleteTaskResponse* response) override;
  grpc::ServerUnaryReactor* CommitCheckpoint(grpc::CallbackServerContext* context,
                                             const v1::CommitCheckpointRequest* request,
                                             v1::CommitCheckpointResponse* response) override;

 private:
  Coordinator* const coordinator_;
  security::Gate* const gate_;
};

}  // namespace refinery::api
