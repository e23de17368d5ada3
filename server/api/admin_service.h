// server/api/admin_service.h
//
// AdminService (proto/refinery/v1/admin_service.proto): what operators ask of a running coordinator. Handlers never block; a backup
// runs in a thread of its own, one at a time.

#pragma once

#include <mutex>
#include <string>
#include <string_view>
#include <thread>

#include "refinery/v1/admin_service.grpc.pb.h"
#include "server/api/coordinator.h"
#include "server/security/gate.h"

namespace refinery::api {

class AdminServiceImpl final : public v1::AdminService::CallbackService {
 public:
  struct Facts {
    std::string listen;
    bool encrypted = false;
  };

  AdminServiceImpl(Coordinator* coordinator, security::Gate* gate);
  ~AdminServiceImpl() override;
  // What is known only when the server listens.
  void set_facts(Facts facts) { facts_ = std::move(facts); }

  grpc::ServerUnaryReactor* GetCoordinator(grpc::CallbackServerContext* context, const v1::GetCoordinatorRequest* request,
                                           v1::CoordinatorInfo* response) override;
  grpc::ServerUnaryReactor* DrainCoordinator(grpc::CallbackServerContext* context, const v1::DrainCoordinatorRequest* request,
                                             v1::CoordinatorInfo* response) override;
  grpc::ServerUnaryReactor* DrainWorker(grpc::CallbackServerContext* context, const v1::DrainWorkerRequest* request,
                                        v1::WorkerInfo* response) override;
  grpc::ServerUnaryReactor* ListTenants(grpc::CallbackServerContext* context, const v1::ListTenantsRequest* request,
                                        v1::ListTenantsResponse* response) override;
  grpc::ServerUnaryReactor* SetTenant(grpc::CallbackServerContext* context, const v1::SetTenantRequest* request,
                                      v1::Tenant* response) override;
  grpc::ServerUnaryReactor* Backup(grpc::CallbackServerContext* context, const v1::BackupRequest* request,
                                   v1::BackupResponse* response) override;

 private:
  void Describe(const Coordinator::Turn& turn, v1::CoordinatorInfo* info) const;
  template <typename Request>
  StatusOr<bool> WasDrained(const Coordinator::Turn& turn, security::Call& call, std::string_view method, const Request& request);
  template <typename Request>
  void RememberDrain(const Coordinator::Turn& turn, const security::Call& call, std::string_view method, const Request& request);

  Coordinator* const coordinator_;
  security::Gate* const gate_;
  Facts facts_;
  const int64_t start_time_ms_;
  jobs::AnsweredRequests drains_;  // drains are not durable, so these need not be either; on the loop
  std::mutex mutex_;
  bool backing_up_ = false;  // guarded by mutex_
  std::thread backup_;
};

}  // namespace refinery::api
