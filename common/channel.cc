#include "common/channel.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/security/tls_certificate_provider.h>
#include <grpcpp/security/tls_credentials_options.h>
#include <grpcpp/support/channel_arguments.h>
#include <grpcpp/support/client_interceptor.h>

#include <charconv>
#include <mutex>
#include <vector>

#include "common/files.h"
#include "common/limits.h"

namespace refinery {
namespace {

using grpc::experimental::FileWatcherCertificateProvider;

constexpr uint64_t kMaxTokenBytes = 4096;
constexpr char kServiceConfig[] = R"({
  "methodConfig": [{
    "name": [{"service": "refinery.v1.JobService"}, {"service": "refinery.v1.ArtifactService"},
             {"service": "refinery.v1.AdminService"}],
    "retryPolicy": {"maxAttempts": 4, "initialBackoff": "0.2s", "maxBackoff": "2s", "backoffMultiplier": 2,
                    "retryableStatusCodes": ["UNAVAILABLE"]}
  }]
})";

std::string HostOf(const std::string& address) {
  if (address.starts_with('[')) return address.substr(1, address.find(']') - 1);
  return address.substr(0, address.rfind(':'));
}

// A bearer token in a file, which may be replaced while we run.
class Token {
 public:
  Token(std::filesystem::path file, std::chrono::seconds reload) : file_(std::move(file)), reload_(reload) {}

  StatusOr<std::string> Read() {
    std::lock_guard lock(mutex_);
    const auto now = std::chrono::steady_clock::now();
    if (!text_.empty() && now - read_ < reload_) return text_;
    StatusOr<std::string> text = ReadFile(file_, kMaxTokenBytes);
    if (!text.ok()) return text_.empty() ? text : text_;  // it may be being replaced
    while (!text->empty() && std::isspace(static_cast<unsigned char>(text->back()))) text->pop_back();
    if (text->empty()) return InvalidArgument(file_.string(), " is empty; it must hold a token of `refinery admin token create`");
    for (const char c : *text) {
      if (c <= ' ' || c > '~') return InvalidArgument(file_.string(), " holds more than one token");
    }
    text_ = *std::move(text);
    read_ = now;
    return text_;
  }

 private:
  const std::filesystem::path file_;
  const std::chrono::seconds reload_;
  std::mutex mutex_;
  std::string text_;
  std::chrono::steady_clock::time_point read_;
};

// Puts the token into each call. (Call credentials would do the same, but gRPC refuses them on loopback without TLS.)
class TokenInterceptor final : public grpc::experimental::Interceptor {
 public:
  explicit TokenInterceptor(std::shared_ptr<Token> token) : token_(std::move(token)) {}
  void Intercept(grpc::experimental::InterceptorBatchMethods* methods) override {
    using grpc::experimental::InterceptionHookPoints;
    if (methods->QueryInterceptionHookPoint(InterceptionHookPoints::PRE_SEND_INITIAL_METADATA)) {
      if (StatusOr<std::string> token = token_->Read(); token.ok()) {
        methods->GetSendInitialMetadata()->emplace("authorization", Join("Bearer ", *token));
      }
    }
    methods->Proceed();
  }

 private:
  const std::shared_ptr<Token> token_;
};

class TokenInterceptorFactory final : public grpc::experimental::ClientInterceptorFactoryInterface {
 public:
  explicit TokenInterceptorFactory(std::shared_ptr<Token> token) : token_(std::move(token)) {}
  grpc::experimental::Interceptor* CreateClientInterceptor(grpc::experimental::ClientRpcInfo*) override {
    return new TokenInterceptor(token_);
  }

 private:
  const std::shared_ptr<Token> token_;
};

grpc::ChannelArguments MakeArguments(const std::string& address) {
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
  return args;
}

std::shared_ptr<FileWatcherCertificateProvider> WatchFiles(const TlsFiles& tls, std::chrono::seconds reload) {
  return std::make_shared<FileWatcherCertificateProvider>(tls.key.string(), tls.certificate.string(), tls.authority.string(),
                                                          static_cast<unsigned>(reload.count()));
}

StatusOr<std::shared_ptr<grpc::ChannelCredentials>> MakeChannelCredentials(const ChannelSecurity& security) {
  if (!security.tls.any()) return grpc::InsecureChannelCredentials();
  RF_RETURN_IF_ERROR(CheckTlsFiles(security.tls));
  if (security.tls.authority.empty()) {
    return InvalidArgument("--tls-authority is missing: the certificate that signed the coordinator's");
  }
  grpc::experimental::TlsChannelCredentialsOptions options;
  options.set_certificate_provider(WatchFiles(security.tls, security.reload));
  options.watch_root_certs();
  if (security.tls.has_identity()) options.watch_identity_key_cert_pairs();
  return grpc::experimental::TlsCredentials(options);
}

}  // namespace

std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address) {
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), MakeArguments(address));
}

Status CheckAddress(std::string_view name, std::string_view address) {
  if (address.starts_with("unix:") || address.find("://") != std::string_view::npos) return absl::OkStatus();
  const size_t colon = address.rfind(':');
  const std::string_view host = address.substr(0, colon == std::string_view::npos ? 0 : colon);
  uint32_t port = 65536;
  const char* end = address.data() + address.size();
  const bool is_port = colon != std::string_view::npos && std::from_chars(address.data() + colon + 1, end, port).ptr == end && port <= 65535;
  const bool is_host = !host.empty() && (host.find(':') == std::string_view::npos || (host.front() == '[' && host.back() == ']'));
  if (is_port && is_host) return absl::OkStatus();
  return InvalidArgument(name, " must be HOST:PORT with a port from 0 to 65535 ([::1]:PORT for IPv6), is '", address, "'");
}

StatusOr<std::shared_ptr<grpc::Channel>> MakeChannel(const std::string& address, const ChannelSecurity& security) {
  RF_RETURN_IF_ERROR(CheckAddress("the coordinator's address", address));
  RF_ASSIGN_OR_RETURN(const auto credentials, MakeChannelCredentials(security));
  std::vector<std::unique_ptr<grpc::experimental::ClientInterceptorFactoryInterface>> interceptors;
  if (!security.token_file.empty()) {
    if (!security.tls.any() && !IsLoopback(address)) {
      return FailedPrecondition("refusing to send a token to ", address, " in the clear, where others could read it; give "
                                "--tls-authority with the certificate that signed the coordinator's");
    }
    auto token = std::make_shared<Token>(security.token_file, security.reload);
    RF_RETURN_IF_ERROR(token->Read().status());
    interceptors.push_back(std::make_unique<TokenInterceptorFactory>(std::move(token)));
  }
  grpc::ChannelArguments args = MakeArguments(address);
  if (!security.server_name.empty()) args.SetSslTargetNameOverride(security.server_name);
  return grpc::experimental::CreateCustomChannelWithInterceptors(address, credentials, args, std::move(interceptors));
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

StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeServerCredentials(const std::string& address,
                                                                        const ListenSecurity& security) {
  if (security.tls.any()) {
    RF_RETURN_IF_ERROR(CheckTlsFiles(security.tls));
    if (!security.tls.has_identity()) {
      return InvalidArgument("--tls-certificate and --tls-key are missing; --tls-authority alone does not encrypt");
    }
    grpc::experimental::TlsServerCredentialsOptions options(WatchFiles(security.tls, security.reload));
    options.watch_identity_key_cert_pairs();
    if (!security.tls.authority.empty()) {
      options.watch_root_certs();
      options.set_cert_request_type(GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
    }
    return grpc::experimental::TlsServerCredentials(options);
  }
  if (!IsLoopback(address) && !security.insecure_anywhere) {
    return FailedPrecondition("refusing to listen on ", address, ": other machines can reach it and the port is not encrypted; "
                              "give --tls-certificate and --tls-key, listen on 127.0.0.1, or pass --insecure-listen-anywhere "
                              "inside a network that you trust entirely");
  }
  return grpc::InsecureServerCredentials();
}

}  // namespace refinery
