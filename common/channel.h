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
#include <memory>
#include <string>

#include "common/status.h"

namespace refinery {

// A channel that pings an idle peer every 20 s, reconnects within 5 s, takes messages up to limits::kMaxMessageBytes and
// retries a call that ended UNAVAILABLE before its first answer (at most 4 attempts). It does not connect before its first call.
// Proxies named in the environment are not used for loopback addresses.
std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address);

// UNAVAILABLE naming the address and what to check when no connection comes about within `timeout`.
Status WaitForConnection(grpc::Channel& channel, const std::string& address, std::chrono::milliseconds timeout);

// Whether only this machine can reach `address`: 127.0.0.0/8, ::1, "localhost" or a Unix socket.
bool IsLoopback(const std::string& address);

// Credentials for listening on `address`. FAILED_PRECONDITION for an address that other machines can reach unless `insecure`
// says that an unencrypted, unauthenticated port is wanted there.
StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeServerCredentials(const std::string& address, bool insecure);

}  // namespace refinery
