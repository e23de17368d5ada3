// server/api/recovery.h
//
// Stands in for the API while the coordinator replays its log: health says NOT_SERVING instead of nothing, and every call is answered
// UNAVAILABLE with the reason RECOVERING, so that clients and workers know to wait rather than to give up.
//
// Threads: none of its own beside gRPC's.

#pragma once

#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/server.h>

#include <memory>
#include <string>

#include "common/channel.h"
#include "common/status.h"

namespace refinery::api {

class RecoveryServer {
 public:
  // Errors as Server::Start's.
  static StatusOr<std::unique_ptr<RecoveryServer>> Start(const std::string& listen, const ListenSecurity& security);
  // Frees the address.
  ~RecoveryServer();

  // With the real port: listen there afterwards.
  const std::string& address() const { return address_; }

 private:
  class Refusal final : public grpc::CallbackGenericService {
   public:
    grpc::ServerGenericBidiReactor* CreateReactor(grpc::GenericCallbackServerContext* context) override;
  };

  Refusal refusal_;
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
};

}  // namespace refinery::api
