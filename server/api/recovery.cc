#include "server/api/recovery.h"

#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/server_builder.h>

#include <chrono>

#include "common/error_details.h"
#include "common/grpc_status.h"
#include "server/api/server.h"

namespace refinery::api {
namespace {

class RefusedCall final : public grpc::ServerGenericBidiReactor {
 public:
  RefusedCall() {
    Finish(ToGrpc(WithRetryAfter(
        WithReason(Unavailable("the coordinator is reading its log after a restart; try again in a moment"), "RECOVERING"),
        std::chrono::seconds(1))));
  }
  void OnDone() override { delete this; }
};

}  // namespace

grpc::ServerGenericBidiReactor* RecoveryServer::Refusal::CreateReactor(grpc::GenericCallbackServerContext*) {
  return new RefusedCall;
}

StatusOr<std::unique_ptr<RecoveryServer>> RecoveryServer::Start(const std::string& listen, const ListenSecurity& security) {
  std::unique_ptr<RecoveryServer> recovery(new RecoveryServer);
  RF_ASSIGN_OR_RETURN(const auto credentials, MakeServerCredentials(listen, security));
  grpc::EnableDefaultHealthCheckService(true);
  grpc::ServerBuilder builder;
  SetServerArguments(builder);
  builder.RegisterCallbackGenericService(&recovery->refusal_);
  RF_ASSIGN_OR_RETURN(recovery->server_, Listen(builder, listen, credentials, &recovery->address_));
  grpc::HealthCheckServiceInterface* health = recovery->server_->GetHealthCheckService();
  health->SetServingStatus(false);
  for (const char* service : kServices) health->SetServingStatus(service, false);
  return recovery;
}

RecoveryServer::~RecoveryServer() {
  if (server_ == nullptr) return;
  server_->Shutdown(std::chrono::system_clock::now());
  server_->Wait();
}

}  // namespace refinery::api
