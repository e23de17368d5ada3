#include "server/api/server.h"

#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>


#include "common/limits.h"
#include "server/api/list.h"

namespace refinery::api {
namespace {

constexpr int kMaxConcurrentStreams = 1024;  // for each connection
constexpr int kMaxMetadataBytes = 16 << 10;

}  // namespace

void SetServerArguments(grpc::ServerBuilder& builder) {
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

StatusOr<std::unique_ptr<grpc::Server>> Listen(grpc::ServerBuilder& builder, const std::string& listen,
                                               const std::shared_ptr<grpc::ServerCredentials>& credentials, std::string* address) {
  int port = 0;
  builder.AddListeningPort(listen, credentials, &port);
  std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr || port == 0) {
    return Unavailable("cannot listen on ", listen,
                       ": another program uses that port or the address is not this machine's; give --listen another one");
  }
  const bool is_path = listen.starts_with("unix:");
  *address = is_path ? listen : Join(listen.substr(0, listen.rfind(':')), ":", port);
  return server;
}

Server::Server(Coordinator* coordinator, std::shared_ptr<security::Gate> gate, std::string page_key, std::chrono::seconds drain)
    : coordinator_(coordinator), drain_(drain), gate_(std::move(gate)), jobs_(coordinator, gate_.get(), std::move(page_key)),
      workers_(coordinator, gate_.get()), artifacts_(coordinator, gate_.get()), admin_(coordinator, gate_.get()) {}

StatusOr<std::unique_ptr<Server>> Server::Start(Coordinator* coordinator, const ServerOptions& options) {
  RF_ASSIGN_OR_RETURN(const auto credentials, MakeServerCredentials(options.listen, options.security));
  RF_ASSIGN_OR_RETURN(std::shared_ptr<security::Gate> gate, security::Gate::Open(options.gate));
  RF_ASSIGN_OR_RETURN(std::string page_key, LoadPageKey(coordinator->options().state));
  grpc::EnableDefaultHealthCheckService(true);
  static const bool reflection = (grpc::reflection::InitProtoReflectionServerBuilderPlugin(), true);
  RF_CHECK(reflection);

  std::unique_ptr<Server> server(new Server(coordinator, std::move(gate), std::move(page_key), options.drain));
  grpc::ServerBuilder builder;
  SetServerArguments(builder);
  if (options.connection_age.count() > 0) {
    using std::chrono::milliseconds;
    builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_MS, static_cast<int>(milliseconds(options.connection_age).count()));
    builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_AGE_GRACE_MS,
                               static_cast<int>(milliseconds(options.connection_grace).count()));
  }
  builder.RegisterService(&server->jobs_);
  builder.RegisterService(&server->workers_);
  builder.RegisterService(&server->artifacts_);
  builder.RegisterService(&server->admin_);
  RF_ASSIGN_OR_RETURN(server->server_, Listen(builder, options.listen, credentials, &server->address_));
  server->admin_.set_facts({.listen = server->address_, .encrypted = options.security.tls.has_identity()});
  grpc::HealthCheckServiceInterface* health = server->server_->GetHealthCheckService();
  for (const char* service : kServices) health->SetServingStatus(service, true);
  return server;
}

void Server::Shutdown() {
  if (server_ == nullptr) return;
  server_->GetHealthCheckService()->SetServingStatus(false);
  coordinator_->BeginShutdown();
  server_->Shutdown(std::chrono::system_clock::now() + drain_);
  server_->Wait();
  server_.reset();
}

Server::~Server() { Shutdown(); }

}  // namespace refinery::api
