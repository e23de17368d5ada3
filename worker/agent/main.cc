// refinery-worker: the agent on each machine. Asks the coordinator for leases and runs each in a refinery-task process.
//
// Exit codes: 0 stopped by SIGTERM or SIGINT (after draining), 1 an internal error, 2 wrong flags, a port in use, a missing
// task program, or a coordinator that refuses this worker.

#include <signal.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <thread>

#include <spdlog/spdlog.h>

#include "common/channel.h"
#include "common/config_file.h"
#include "common/logging.h"
#include "common/process.h"
#include "refinery/v1/config.pb.h"
#include "worker/agent/machine.h"
#include "worker/agent/session.h"

namespace {

// What CLI11 cannot write into the configuration itself.
struct Flags {
  refinery::v1::WorkerConfig config;
  std::string config_file;
  uint32_t slots = 1;
  uint32_t threads = 0;
  double drain_grace = 10;
  std::vector<std::string> labels;
  bool check = false;
  bool print = false;
};

refinery::v1::WorkerConfig DefaultConfig() {
  refinery::v1::WorkerConfig config;
  config.set_coordinator("127.0.0.1:7433");
  config.set_metrics_address("127.0.0.1:9465");
  config.set_slots(1);
  config.set_drain_grace(10);
  config.set_log_level("info");
  config.set_log_format("text");
  return config;
}

// A flag beats its variable, which beats the file, which beats the default (all three are in `flags.config` already).
void AddFlags(CLI::App& app, Flags& flags) {
  refinery::v1::WorkerConfig& c = flags.config;
  const auto text = [&app](const char* name, const char* variable, std::string* field, const char* help) {
    app.add_option(name, *field, help)->envname(variable);
  };
  app.add_option("--config", flags.config_file, "YAML file with these settings")->envname("REFINERY_WORKER_CONFIG");
  text("--coordinator", "REFINERY_COORDINATOR", c.mutable_coordinator(), "HOST:PORT of refineryd");
  text("--token-file", "REFINERY_TOKEN_FILE", c.mutable_token_file(), "file with a worker's token of `refinery admin token`");
  text("--tls-authority", "REFINERY_TLS_AUTHORITY", c.mutable_tls()->mutable_authority(),
       "PEM file that signed the coordinator's certificate: use TLS");
  text("--tls-certificate", "REFINERY_TLS_CERTIFICATE", c.mutable_tls()->mutable_certificate(),
       "PEM file: our own certificate, for mutual TLS");
  text("--tls-key", "REFINERY_TLS_KEY", c.mutable_tls()->mutable_key(), "PEM file: its key");
  text("--server-name", "REFINERY_SERVER_NAME", c.mutable_server_name(),
       "name in the coordinator's certificate, if not the HOST that is dialled");
  text("--cache", "REFINERY_WORKER_CACHE", c.mutable_cache(), "folder for artifacts, models and work (default ~/.cache/refinery)");
  app.add_option("--slots", flags.slots, "attempts at a time")->check(CLI::Range(1, 256))->envname("REFINERY_WORKER_SLOTS");
  app.add_option("--threads", flags.threads, "threads per attempt (default: all cores / slots)")->envname("REFINERY_WORKER_THREADS");
  text("--id", "REFINERY_WORKER_ID", c.mutable_id(), "name of this worker (default: the host's name and a number)");
  app.add_option("--label", flags.labels, "KEY=VALUE that jobs may ask for; may be given several times")
      ->envname("REFINERY_WORKER_LABELS")->delimiter(',')->type_name("KEY=VALUE");
  text("--address", "REFINERY_WORKER_ADDRESS", c.mutable_address(), "under which other workers reach this machine (default: its host name)");
  text("--metrics-address", "REFINERY_WORKER_METRICS_ADDRESS", c.mutable_metrics_address(), "HOST:PORT to serve /metrics on, or none");
  text("--task-program", "REFINERY_WORKER_TASK_PROGRAM", c.mutable_task_program(), "refinery-task (default: the one beside this program)");
  app.add_option("--drain-grace", flags.drain_grace, "seconds that running attempts get after SIGTERM")
      ->check(CLI::NonNegativeNumber)->envname("REFINERY_WORKER_DRAIN_GRACE");
  text("--log-level", "REFINERY_WORKER_LOG_LEVEL", c.mutable_log_level(), "trace, debug, info, warn, error or off");
  text("--log-format", "REFINERY_WORKER_LOG_FORMAT", c.mutable_log_format(), "text or json");
  app.add_flag("--check-config", flags.check, "say whether the settings are good, and stop");
  app.add_flag("--print-default-config", flags.print, "write a file for --config with every default, and stop");
}

int Fail(const absl::Status& status, int code) {
  std::fprintf(stderr, "refinery-worker: %s\n", refinery::Message(status).c_str());
  return code;
}

// Labels of the flags beside those of the file; of one key the flag's.
absl::Status TakeLabels(Flags& flags) {
  RF_ASSIGN_OR_RETURN(const auto labels, refinery::agent::ParseLabels(flags.labels));
  for (const auto& [key, value] : labels) (*flags.config.mutable_labels())[key] = value;
  return refinery::agent::CheckLabels({flags.config.labels().begin(), flags.config.labels().end()});
}

std::string DefaultCache() {
  const char* home = std::getenv("HOME");
  return refinery::Join(home == nullptr ? "/tmp" : home, "/.cache/refinery");
}

}  // namespace

int main(int argc, char** argv) {
  // Before any thread starts: signals are taken by the one that waits for them.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  sigaddset(&signals, SIGHUP);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);

  CLI::App app{"Refinery worker: runs the tasks that a coordinator leases to it."};
  app.set_version_flag("--version", REFINERY_VERSION);
  Flags flags{.config = DefaultConfig()};
  refinery::v1::WorkerConfig& config = flags.config;
  if (const std::string path = refinery::ConfigPath(argc, argv, "REFINERY_WORKER_CONFIG"); !path.empty()) {
    if (const auto status = refinery::LoadConfig(path, &config); !status.ok()) return Fail(status, 2);
    flags.slots = std::clamp(config.slots(), 1u, 256u);
    flags.threads = config.threads();
    flags.drain_grace = config.drain_grace();
  }
  AddFlags(app, flags);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  if (flags.print) {
    std::cout << refinery::ConfigText(DefaultConfig(), "refinery-worker");
    return 0;
  }
  config.set_slots(flags.slots);
  config.set_threads(flags.threads);
  config.set_drain_grace(flags.drain_grace);
  if (auto status = TakeLabels(flags); !status.ok()) return Fail(status, 2);
  if (auto status = refinery::InitLogging("refinery-worker", config.log_level(), config.log_format()); !status.ok()) {
    return Fail(status, 2);
  }
  const auto channel = refinery::MakeChannel(
      config.coordinator(), {.tls = {.certificate = config.tls().certificate(), .key = config.tls().key(),
                                     .authority = config.tls().authority()},
                             .token_file = config.token_file(), .server_name = config.server_name()});
  if (!channel.ok()) return Fail(channel.status(), 2);
  if (flags.check) {
    std::cout << refinery::ConfigText(config, "refinery-worker");
    std::cerr << "refinery-worker: the configuration is good\n";
    return 0;
  }
  if (config.cache().empty()) config.set_cache(DefaultCache());
  if (config.task_program().empty()) config.set_task_program((refinery::ProgramFolder() / "refinery-task").string());
  if (flags.threads == 0) flags.threads = std::max(1u, std::thread::hardware_concurrency() / flags.slots);

  auto metrics = refinery::agent::WorkerMetrics::Serve(config.metrics_address());
  if (!metrics.ok()) return Fail(metrics.status(), 2);
  if ((*metrics)->port() > 0) spdlog::info("metrics on port {}", (*metrics)->port());
  auto session = refinery::agent::Session::Open({
      .channel = *channel,
      .coordinator = config.coordinator(),
      .cache = config.cache(),
      .id = config.id(),
      .slots = flags.slots,
      .threads = flags.threads,
      .labels = {config.labels().begin(), config.labels().end()},
      .address = config.address(),
      .task_program = config.task_program(),
      .drain_grace = std::chrono::milliseconds(static_cast<int64_t>(flags.drain_grace * 1000)),
      .metrics = metrics->get(),
  });
  if (!session.ok()) return Fail(session.status(), 2);

  std::thread([&session, signals] {
    int number = 0;
    do {
      sigwait(&signals, &number);  // a terminal that closes ends nothing
    } while (number == SIGHUP);
    spdlog::info("signal {}: draining; a second one ends at once", number);
    (*session)->Stop();
    sigwait(&signals, &number);
    _exit(0);   // the kernel ends the tasks with us
  }).detach();
  absl::Status status = (*session)->Run();
  if (!status.ok()) return Fail(status, 2);
  session->reset();
  return 0;
}
