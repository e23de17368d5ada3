// server/api/server.h
//
// The coordinator's gRPC server: job, worker and artifact services, health and reflection on one port.

#pragma once

#include <grpcpp/server.h>

#include <memory>
#include <string>

#include "common/channel.h"
#include "common/status.h"
#include "server/api/artifact_service.h"
#include "server/api/coordinator.h"
#include "server/api/job_service.h"
#include "server/api/worker_service.h"

namespace refinery::api {

struct ServerOptions {
  std::string listen = "127.0.0.1:0";  // port 0: any
  ListenSecurity security;
};

class Server {
 public:
  // UNAVAILABLE when the address is taken; FAILED_PRECONDITION for one that is not loopback without TLS, unless told so.
  static StatusOr<std::unique_ptr<Server>> Start(Coordinator* coordinator, const ServerOptions& options);
  ~Server();

  // Where it listens, with the real port.
  const std::string& address() const { return address_; }

  // Graceful: health says NOT_SERVING, polls and streams are answered, calls that still run after a few seconds are cancelled.
  void Shutdown();

 private:
  explicit Server(Coordinator* coordinator);

  Coordinator* const coordinator_;
  JobServiceImpl jobs_;
  WorkerServiceImpl workers_;
  ArtifactServiceImpl artifacts_;
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
};

}  // namespace refinery::api
