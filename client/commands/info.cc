// refinery worker list, refinery version.

#include <grpcpp/grpcpp.h>

#include <iostream>

#include "client/commands/commands.h"
#include "client/exit_code.h"
#include "client/render/job_text.h"
#include "client/render/json.h"
#include "common/channel.h"
#include "common/grpc_status.h"
#include "common/limits.h"

namespace refinery::client {
namespace {

constexpr std::chrono::milliseconds kVersionWait{500};

StatusOr<int> ListWorkers(const Globals& globals) {
  RF_ASSIGN_OR_RETURN(Connection connection, Connect(globals));
  grpc::ClientContext context;
  SetDeadline(&context);
  v1::ListWorkersResponse workers;
  RF_RETURN_IF_ERROR(FromGrpc(connection.jobs->ListWorkers(&context, v1::ListWorkersRequest(), &workers)));
  std::cout << (globals.json ? ToJson(workers) : WorkerTable(workers));
  return kOk;
}

StatusOr<int> Version(const Globals& globals) {
  v1::VersionInfo ours;
  ours.set_version(REFINERY_VERSION);
  ours.set_grpc(grpc::Version());
  ours.set_protocol(limits::kProtocolVersion);
  if (globals.json) {
    std::cout << ToJson(ours);
    return kOk;
  }
  std::cout << "refinery " << ours.version() << " (protocol " << ours.protocol() << ", gRPC " << ours.grpc() << ")\n";
  // The coordinator's is good to know and may be missing.
  RF_ASSIGN_OR_RETURN(auto channel, MakeChannel(globals.coordinator, globals.security));
  if (!WaitForConnection(*channel, globals.coordinator, kVersionWait).ok()) return kOk;
  grpc::ClientContext context;
  SetDeadline(&context);
  v1::VersionInfo theirs;
  if (v1::JobService::NewStub(channel)->GetVersion(&context, v1::GetVersionRequest(), &theirs).ok()) {
    std::cout << "refineryd " << theirs.version() << " (protocol " << theirs.protocol() << ", gRPC " << theirs.grpc()
              << ") at " << globals.coordinator << "\n";
  }
  return kOk;
}

}  // namespace

void AddWorker(CLI::App& app, Globals& globals, Result& result) {
  CLI::App* worker = app.add_subcommand("worker", "Workers of the coordinator");
  worker->require_subcommand(1);
  worker->add_subcommand("list", "List the workers")->callback([&globals, &result] { result = ListWorkers(globals); });
}

void AddVersion(CLI::App& app, Globals& globals, Result& result) {
  app.add_subcommand("version", "Print the version of this program, and the coordinator's if it answers")
      ->callback([&globals, &result] { result = Version(globals); });
}

}  // namespace refinery::client
