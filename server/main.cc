// refineryd: the coordinator. Accepts jobs, plans them into tasks, leases tasks to workers and keeps every state change and
// artifact durable under --state.
//
// Exit codes: 0 after SIGTERM or SIGINT, 1 when it cannot go on, 2 for wrong arguments, a taken port or a folder in use.

#include <grpcpp/grpcpp.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <csignal>
#include <cstdio>
#include <cstdlib>

#include "common/channel.h"
#include "common/files.h"
#include "common/logging.h"
#include "server/api/server.h"
#include "server/report/report.h"

namespace refinery {
namespace {

struct Flags {
  std::string state;
  std::string listen = "127.0.0.1:7433";
  bool insecure_listen = false;
  std::string metrics_address = "127.0.0.1:9464";
  int64_t lease_ttl_ms = limits::kLeaseTtl.count();
  std::string log_level = "info";
};

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
    pthread_sigmask(SIG_BLOCK, &set_, nullptr);
    std::signal(SIGPIPE, SIG_IGN);
  }
  int Wait() const {
    int signal = 0;
    sigwait(&set_, &signal);
    return signal;
  }

 private:
  sigset_t set_;
};

Status Serve(const Flags& flags, const Signals& signals) {
  api::CoordinatorOptions options{.state = flags.state,
                                  .lease_ttl = std::chrono::milliseconds(flags.lease_ttl_ms),
                                  .make_report = report::MakeReport};
  if (const char* count = std::getenv("REFINERY_EXIT_AFTER_EVENT")) {
    options.exit_after_event = std::strtoull(count, nullptr, 10);
  }
  RF_ASSIGN_OR_RETURN(const auto coordinator, api::Coordinator::Open(std::move(options)));
  if (flags.metrics_address != "none") {
    RF_ASSIGN_OR_RETURN(const std::string address, coordinator->metrics().Serve(flags.metrics_address));
    RF_RETURN_IF_ERROR(WriteFileAtomically(std::filesystem::path(flags.state) / "metrics_address", address + "\n"));
    spdlog::info("metrics address={}", address);
  }
  RF_ASSIGN_OR_RETURN(const auto server, api::Server::Start(coordinator.get(), {.listen = flags.listen,
                                                                                .security = {.insecure_anywhere = flags.insecure_listen}}));
  if (!IsLoopback(server->address())) {
    spdlog::warn("listening on {} WITHOUT encryption and WITHOUT authentication: whoever reaches this port can run jobs and "
                 "read artifacts", server->address());
  }
  const std::filesystem::path address_file = std::filesystem::path(flags.state) / "address";
  RF_RETURN_IF_ERROR(WriteFileAtomically(address_file, server->address() + "\n"));
  spdlog::info("serving address={} state={} version={}", server->address(), flags.state, REFINERY_VERSION);

  const int signal = signals.Wait();
  spdlog::info("stopping signal={}", signal);
  std::error_code ignored;
  std::filesystem::remove(address_file, ignored);  // nobody should dial a coordinator that is gone
  server->Shutdown();
  return absl::OkStatus();
}

int Main(int argc, char** argv) {
  setenv("GRPC_VERBOSITY", "NONE", 0);  // our one sentence says it; gRPC's own lines only on request
  Flags flags;
  CLI::App app("refineryd: the coordinator of Refinery");
  app.set_version_flag("--version", Join("refineryd ", REFINERY_VERSION, " (gRPC ", grpc::Version(), ")"));
  app.add_option("--state", flags.state, "Folder of the event log and the artifacts; one coordinator each")->required();
  app.add_option("--listen", flags.listen, "HOST:PORT to serve on; port 0 takes any, written to <state>/address")
      ->capture_default_str();
  app.add_flag("--insecure-listen,--insecure-listen-anywhere", flags.insecure_listen,
               "Allow --listen on an address that other machines reach, without encryption or authentication");
  app.add_option("--metrics-address", flags.metrics_address, "HOST:PORT of the /metrics page, or none")
      ->capture_default_str();
  app.add_option("--lease-ttl-ms", flags.lease_ttl_ms, "How long a silent worker keeps its tasks")
      ->check(CLI::Range(100, 3'600'000))->capture_default_str();
  app.add_option("--log-level", flags.log_level, "trace, debug, info, warn, error or off")->capture_default_str();
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& e) {
    return app.exit(e) == 0 ? 0 : 2;
  }
  if (const Status status = InitLogging("refineryd", flags.log_level); !status.ok()) return Complain(status);
  const Signals signals;  // before any thread is made
  const Status status = Serve(flags, signals);
  if (!status.ok()) return Complain(status);
  spdlog::info("stopped");
  return 0;
}

}  // namespace
}  // namespace refinery

int main(int argc, char** argv) { return refinery::Main(argc, argv); }
