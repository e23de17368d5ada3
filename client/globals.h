// client/globals.h
//
// The options that every command has, and the connection they lead to.

#pragma once

#include <filesystem>
#include <memory>
#include <string>

#include <grpcpp/channel.h>

#include "common/channel.h"
#include "common/status.h"
#include "refinery/v1/job_service.grpc.pb.h"

namespace refinery::client {

struct Globals {
  std::string coordinator = "127.0.0.1:7433";
  bool coordinator_given = false;     // by flag or environment
  ChannelSecurity security;           // for `coordinator`; programs that this one starts itself need none
  bool json = false;                  // -o json
  std::filesystem::path data_folder;  // pulled benchmarks
};

// A coordinator that has answered.
struct Connection {
  std::string address;
  std::shared_ptr<grpc::Channel> channel;
  std::unique_ptr<v1::JobService::Stub> jobs;
};

// UNAVAILABLE naming the address and the next step when nobody answers within a few seconds.
StatusOr<Connection> Connect(const std::string& address, const ChannelSecurity& security = {});
StatusOr<Connection> Connect(const Globals& globals);

// A call's deadline set to the usual one.
void SetDeadline(grpc::ClientContext* context);

// Unary calls, with the status turned into ours.
StatusOr<v1::Job> GetJob(Connection& connection, const std::string& id);

// The exit code for an error.
int ExitCodeOf(const Status& status);

}  // namespace refinery::client
