// refineryd: the coordinator. Accepts jobs, plans them into tasks, leases tasks to workers and keeps every state change and
// artifact durable under --state.
//
// Exit codes: 0 after SIGTERM or SIGINT, 1 when it cannot go on, 2 for wrong arguments, a taken port or a folder in use.

#include <grpcpp/grpcpp.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <thread>

#include "common/channel.h"
#include "common/config_file.h"
#include "common/files.h"
#include "common/logging.h"
#include "server/api/recovery.h"
#include "server/api/server.h"
#include "server/config/config.h"
#include "server/config/notify.h"
#include "server/report/report.h"
#include "server/store/backup.h"

namespace refinery {
namespace {

int Complain(const Status& status) {
  std::fprintf(stderr, "refineryd: %s\n", Message(status).c_str());
  return 2;
}

// Blocks the signals that end the program in every thread; Wait takes them one by one.
class Signals {
 public:
  Signals() {
    sigemptyset(&set_);
    sigaddset(&set_, SIGTERM);
    sigaddset(&set_, SIGINT);
    sigaddset(&set_, SIGHUP);
    pthread_sigmask(SIG_BLOCK, &set_, nullptr);
    std::signal(SIGPIPE, SIG_IGN);
  }
  int Wait() const {
    for (int signal = 0;;) {
      sigwait(&set_, &signal);
      if (signal != SIGHUP) return signal;
      spdlog::info("SIGHUP: certificates and principals are read again by themselves; everything else takes a restart");
    }
  }

 private:
  sigset_t set_;
};

// The address of the recovery server may take a moment to become free.
StatusOr<std::unique_ptr<api::Server>> StartServer(api::Coordinator* coordinator, const api::ServerOptions& options) {
  constexpr std::chrono::milliseconds kPatience{3'000}, kPause{20};
  for (std::chrono::milliseconds waited{0};; waited += kPause) {
    auto server = api::Server::Start(coordinator, options);
    if (server.ok() || !absl::IsUnavailable(server.status()) || waited >= kPatience) return server;
    std::this_thread::sleep_for(kPause);
  }
}

void WarnOfOpenDoors(const v1::CoordinatorConfig& config, const std::string& address) {
  if (config.metrics_address() != "none" && !IsLoopback(config.metrics_address())) {
    spdlog::warn("the metrics page at {} is open to whoever reaches it: nothing guards it", config.metrics_address());
  }
  if (IsLoopback(address)) return;
  if (config.tls().certificate().empty()) {
    spdlog::warn("listening on {} WITHOUT ENCRYPTION: tokens, recipes and data cross the network in the clear", address);
  }
  if (config.principals().empty() && config.tls().authority().empty()) {
    spdlog::warn("listening on {} WITHOUT AUTHENTICATION: whoever reaches this port can run jobs and read artifacts", address);
  }
}

void Notify(std::string_view message) {
  const Status status = config::NotifySupervisor(message);
  if (!status.ok()) spdlog::warn("{}", Message(status));
}

store::DiskMark MarkOf(double percent, double gib) {
  return {.used_above = percent / 100, .free_below = static_cast<uint64_t>(gib * (1 << 30))};
}

Status Serve(const v1::CoordinatorConfig& config, const Signals& signals) {
  const std::filesystem::path state = config.state();
  api::ServerOptions serving{.listen = config.listen(),
                             .security = config::SecurityOf(config),
                             .gate = {.principals = config.principals(),
                                      .audit_log = config.audit_log(),
                                      .limits = {.rate_per_second = config.rate_per_second(),
                                                 .concurrent_calls = config.concurrent_calls()}},
                             .drain = std::chrono::seconds(config.drain_seconds()),
                             .connection_age = std::chrono::seconds(config.connection_age_seconds())};
  if (config.audit_log().empty()) serving.gate.audit_log = state / "audit.jsonl";
  if (config.audit_log() == "none") serving.gate.audit_log.clear();
  RF_ASSIGN_OR_RETURN(auto recovery, api::RecoveryServer::Start(config.listen(), serving.security));
  serving.listen = recovery->address();

  api::CoordinatorOptions options{.state = state,
                                  .lease_ttl = std::chrono::milliseconds(config.lease_ttl_ms()),
                                  .make_report = report::MakeReport,
                                  .disk_full = MarkOf(config.disk_full_percent(), config.disk_full_free_gib()),
                                  .disk_read_only = MarkOf(config.disk_read_only_percent(), config.disk_read_only_free_gib())};
  RF_RETURN_IF_ERROR(api::ReadTestSettings(&options));
  RF_ASSIGN_OR_RETURN(const auto coordinator, api::Coordinator::Open(std::move(options)));
  if (config.metrics_address() != "none") {
    RF_ASSIGN_OR_RETURN(const std::string address, coordinator->metrics().Serve(config.metrics_address()));
    RF_RETURN_IF_ERROR(WriteFileAtomically(state / "metrics_address", address + "\n"));
    spdlog::info("metrics address={}", address);
  }
  recovery.reset();
  RF_ASSIGN_OR_RETURN(const auto server, StartServer(coordinator.get(), serving));
  WarnOfOpenDoors(config, server->address());
  const std::filesystem::path address_file = state / "address";
  RF_RETURN_IF_ERROR(WriteFileAtomically(address_file, server->address() + "\n"));
  spdlog::info("serving address={} state={} version={} tls={} authenticated={}", server->address(), config.state(),
               REFINERY_VERSION, config.tls().certificate().empty() ? 0 : 1, config.principals().empty() ? 0 : 1);

  Notify("READY=1");

  const int signal = signals.Wait();
  Notify("STOPPING=1");
  spdlog::info("stopping signal={}", signal);
  std::error_code ignored;
  std::filesystem::remove(address_file, ignored);  // nobody should dial a coordinator that is gone
  server->Shutdown();
  return absl::OkStatus();
}

int Main(int argc, char** argv) {
  setenv("GRPC_VERBOSITY", "NONE", 0);  // our one sentence says it; gRPC's own lines only on request
  const StatusOr<config::CommandLine> line = config::ReadCommandLine(argc, argv);
  if (!line.ok()) return Complain(line.status());
  if (line->exit_code >= 0) return line->exit_code;
  if (line->print) {
    std::fputs(ConfigText(config::DefaultConfig(), "refineryd").c_str(), stdout);
    return 0;
  }
  if (!line->restore.empty()) {
    const StatusOr<store::BackupInfo> info = store::Restore(line->restore, line->config.state());
    if (!info.ok()) return Complain(info.status());
    std::fprintf(stderr, "refineryd: %s holds %llu events and %llu blobs now\n", line->config.state().c_str(),
                 static_cast<unsigned long long>(info->last_seq), static_cast<unsigned long long>(info->blobs));
    return 0;
  }
  const Signals signals;  // before any thread is made
  if (const Status status = config::CheckConfig(line->config); !status.ok()) return Complain(status);
  if (line->check) {
    std::fputs(ConfigText(line->config, "refineryd").c_str(), stdout);
    std::fputs("refineryd: the configuration is good\n", stderr);
    return 0;
  }
  const Status status = Serve(line->config, signals);
  if (!status.ok()) return Complain(status);
  spdlog::info("stopped");
  return 0;
}

}  // namespace
}  // namespace refinery

int main(int argc, char** argv) { return refinery::Main(argc, argv); }
