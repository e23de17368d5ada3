#include "common/channel.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include "common/limits.h"

namespace refinery {
namespace {

constexpr char kServiceConfig[] = R"({
  "methodConfig": [{
    "name": [{"service": "refinery.v1.JobService"}, {"service": "refinery.v1.ArtifactService"}],
    "retryPolicy": {"maxAttempts": 4, "initialBackoff": "0.2s", "maxBackoff": "2s", "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"]}
  }]
})";

std::string HostOf(const std::string& address) {
  if (address.starts_with('[')) return address.substr(1, address.find(']') - 1);
  return address.substr(0, address.rfind(':'));
}

}  // namespace

std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address) {
  grpc::ChannelArguments args;
  args.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 20'000);
  args.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10'000);
  args.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  args.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  args.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  args.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 100);
  args.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 5'000);
  args.SetMaxReceiveMessageSize(limits::kMaxMessageBytes);
  args.SetMaxSendMessageSize(limits::kMaxMessageBytes);
  args.SetServiceConfigJSON(kServiceConfig);
  if (IsLoopback(address)) args.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), args);
}

Status WaitForConnection(grpc::Channel& channel, const std::string& address, std::chrono::milliseconds timeout) {
  if (channel.WaitForConnected(std::chrono::system_clock::now() + timeout)) return absl::OkStatus();
  return Unavailable("no coordinator answers at ", address, " (waited ", timeout.count(),
                     " ms); start refineryd there or give the right address");
}

bool IsLoopback(const std::string& address) {
  if (address.starts_with("unix:")) return true;
  const std::string host = HostOf(address);
  return host == "localhost" || host == "::1" || host.starts_with("127.");
}

StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeServerCredentials(const std::string& address, bool insecure) {
  if (!IsLoopback(address) && !insecure) {
    return FailedPrecondition("refusing to listen on ", address, ": other machines can reach it and the port is neither "
                              "encrypted nor authenticated; listen on 127.0.0.1, or pass --insecure-listen inside a network "
                              "that you trust entirely");
  }
  return grpc::InsecureServerCredentials();
}

}  // namespace refinery
