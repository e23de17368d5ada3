#include "server/api/server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/server_builder.h>

#include "common/channel.h"
#include "common/limits.h"

namespace refinery::api {
namespace {

constexpr std::chrono::seconds kShutdownGrace{3};
constexpr int kMaxConcurrentStreams = 1024;  // for each connection
constexpr int kMaxMetadataBytes = 16 << 10;

void SetArguments(grpc::ServerBuilder& builder) {
  // Otherwise two coordinators could share a port and split the calls between them without a word.
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  // Pings: ours find dead workers; clients ping every 20 s and may do so at twice that rate.
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, 20'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10'000);
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 10'000);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, kMaxConcurrentStreams);
  builder.AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, kMaxMetadataBytes);
  builder.SetMaxReceiveMessageSize(limits::kMaxMessageBytes);
  builder.SetMaxSendMessageSize(limits::kMaxMessageBytes);
}

}  // namespace

Server::Server(Coordinator* coordinator)
    : coordinator_(coordinator), jobs_(coordinator), workers_(coordinator), artifacts_(&coordinator->blobs()) {}

StatusOr<std::unique_ptr<Server>> Server::Start(Coordinator* coordinator, const ServerOptions& options) {
  RF_ASSIGN_OR_RETURN(const auto credentials, MakeServerCredentials(options.listen, options.security));
  grpc::EnableDefaultHealthCheckService(true);
  static const bool reflection = (grpc::reflection::InitProtoReflectionServerBuilderPlugin(), true);
  RF_CHECK(reflection);

  std::unique_ptr<Server> server(new Server(coordinator));
  grpc::ServerBuilder builder;
  SetArguments(builder);
  int port = 0;
  builder.AddListeningPort(options.listen, credentials, &port);
  builder.RegisterService(&server->jobs_);
  builder.RegisterService(&server->workers_);
  builder.RegisterService(&server->artifacts_);
  server->server_ = builder.BuildAndStart();
  if (server->server_ == nullptr || port == 0) {
    return Unavailable("cannot listen on ", options.listen,
                       ": another program uses that port or the address is not this machine's; give --listen another one");
  }
  const bool is_path = options.listen.starts_with("unix:");
  server->address_ = is_path ? options.listen : Join(options.listen.substr(0, options.listen.rfind(':')), ":", port);
  grpc::HealthCheckServiceInterface* health = server->server_->GetHealthCheckService();
  for (const char* service : {"refinery.v1.JobService", "refinery.v1.WorkerService", "refinery.v1.ArtifactService"}) {
    health->SetServingStatus(service, true);
  }
  return server;
}

void Server::Shutdown() {
  if (server_ == nullptr) return;
  server_->GetHealthCheckService()->SetServingStatus(false);
  coordinator_->BeginShutdown();
  server_->Shutdown(std::chrono::system_clock::now() + kShutdownGrace);
  server_->Wait();
  server_.reset();
}

Server::~Server() { Shutdown(); }

}  // namespace refinery::api
