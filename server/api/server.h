// server/api/server.h
//
// The coordinator's gRPC server: job, worker, artifact and admin services, health and reflection on one port.

#pragma once

#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include <memory>
#include <string>

#include "common/channel.h"
#include "common/status.h"
#include "server/api/admin_service.h"
#include "server/api/artifact_service.h"
#include "server/api/coordinator.h"
#include "server/api/job_service.h"
#include "server/api/worker_service.h"
#include "server/security/gate.h"

namespace refinery::api {

inline constexpr const char* kServices[] = {"refinery.v1.JobService", "refinery.v1.WorkerService", "refinery.v1.ArtifactService",
                                            "refinery.v1.AdminService"};

struct ServerOptions {
  std::string listen = "127.0.0.1:0";  // port 0: any
  ListenSecurity security;
  security::GateOptions gate;
  std::chrono::seconds drain{3};       // that calls get to end when it shuts down
  // After this time (a tenth more or less) a connection is asked to be made anew, so that it meets new certificates and new addresses;
  // its calls get the grace to end. 0 = never.
  std::chrono::seconds connection_age{0};
  std::chrono::seconds connection_grace{300};
};

class Server {
 public:
  // UNAVAILABLE when the address is taken; FAILED_PRECONDITION for one that is not loopback without TLS, unless told so. Other
  // errors as Gate::Open's and MakeServerCredentials'.
  static StatusOr<std::unique_ptr<Server>> Start(Coordinator* coordinator, const ServerOptions& options);
  ~Server();

  // Where it listens, with the real port.
  const std::string& address() const { return address_; }

  // Graceful: health says NOT_SERVING, polls and streams are answered, calls that still run after `drain` are cancelled.
  void Shutdown();

 private:
  Server(Coordinator* coordinator, std::shared_ptr<security::Gate> gate, std::string page_key, std::chrono::seconds drain);

  Coordinator* const coordinator_;
  const std::chrono::seconds drain_;
  const std::shared_ptr<security::Gate> gate_;
  JobServiceImpl jobs_;
  WorkerServiceImpl workers_;
  ArtifactServiceImpl artifacts_;
  AdminServiceImpl admin_;
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
};

// Keepalive, limits, and one server for a port; the same for everything that listens.
void SetServerArguments(grpc::ServerBuilder& builder);
// Starts what `builder` holds; `address` becomes `listen` with the real port.
StatusOr<std::unique_ptr<grpc::Server>> Listen(grpc::ServerBuilder& builder, const std::string& listen,
                                               const std::shared_ptr<grpc::ServerCredentials>& credentials, std::string* address);

}  // namespace refinery::api
