// common/channel.h
//
// Connections between the programs: one way to dial the coordinator and one way to decide whom it lets in, so that keepalive,
// limits and credentials are the same everywhere.
//
// Addresses are "HOST:PORT" ("[::1]:PORT" for IPv6) or "unix:PATH".
// Threads: everything here may be called from any thread. Keep one channel per process and peer.

#pragma once

#include <grpcpp/channel.h>
#include <grpcpp/security/server_credentials.h>

#include <chrono>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

#include "common/status.h"
#include "common/tls.h"

namespace refinery {

// INVALID_ARGUMENT unless `address` is one; `name` says what it is of: "listen", "coordinator". gRPC itself takes 443 for a missing port
// and wraps numbers that are too large.
Status CheckAddress(std::string_view name, std::string_view address);

// How to prove who we are and whom we believe.
struct ChannelSecurity {
  TlsFiles tls;                        // any of them set: TLS; `authority` is needed then
  std::filesystem::path token_file;    // holds a bearer token, sent with every call; read again when it changes
  std::string server_name;             // that the coordinator's certificate must have; empty: the host that is dialled
  std::chrono::seconds reload{60};     // how often the files are looked at
};

// A channel that pings an idle peer every 20 s, reconnects within 5 s, takes messages up to limits::kMaxMessageBytes and
// retries a call that ended UNAVAILABLE before its first answer (at most 4 attempts). It does not connect before its first call.
// Proxies named in the environment are not used for loopback addresses.
std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address);
// The same with credentials. INVALID_ARGUMENT or NOT_FOUND for files that are not what they should be; FAILED_PRECONDITION for a
// token that would cross a network in the clear.
StatusOr<std::shared_ptr<grpc::Channel>> MakeChannel(const std::string& address, const ChannelSecurity& security);

// UNAVAILABLE naming the address and what to check when no connection comes about within `timeout`.
Status WaitForConnection(grpc::Channel& channel, const std::string& address, std::chrono::milliseconds timeout);

// Whether only this machine can reach `address`: 127.0.0.0/8, ::1, "localhost" or a Unix socket.
bool IsLoopback(const std::string& address);

struct ListenSecurity {
  TlsFiles tls;                     // certificate and key: TLS; with authority only clients with a certificate of its are let in
  bool insecure_anywhere = false;   // allow an unencrypted port that other machines can reach
  std::chrono::seconds reload{60};
};

// Credentials for listening on `address`. FAILED_PRECONDITION for an address that other machines can reach without TLS unless
// `insecure_anywhere` says that an unencrypted port is wanted there. Errors of the files as CheckTlsFiles.
StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeServerCredentials(const std::string& address,
                                                                        const ListenSecurity& security);

}  // namespace refinery
