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
#include "common/logging.h"
#include "common/process.h"
#include "worker/agent/session.h"

namespace {

struct Flags {
  std::string coordinator = "127.0.0.1:7433";
  std::string cache;
  std::string id;
  std::string metrics_address = "127.0.0.1:9465";
  std::string task_program;
  std::string log_level = "info";
  uint32_t slots = 1;
  uint32_t threads = 0;
  double drain_grace = 10;
};

void AddFlags(CLI::App& app, Flags& flags) {
  app.add_option("--coordinator", flags.coordinator, "HOST:PORT of refineryd")->envname("REFINERY_COORDINATOR");
  app.add_option("--cache", flags.cache, "folder for artifacts, models and work (default ~/.cache/refinery)");
  app.add_option("--slots", flags.slots, "attempts at a time")->check(CLI::Range(1, 256));
  app.add_option("--threads", flags.threads, "threads per attempt (default: all cores / slots)");
  app.add_option("--id", flags.id, "name of this worker (default: the host's name and a number)");
  app.add_option("--metrics-address", flags.metrics_address, "HOST:PORT to serve /metrics on, or none");
  app.add_option("--task-program", flags.task_program, "refinery-task (default: the one beside this program)");
  app.add_option("--drain-grace", flags.drain_grace, "seconds that running attempts get after SIGTERM")
      ->check(CLI::NonNegativeNumber);
  app.add_option("--log-level", flags.log_level, "trace, debug, info, warn, error or off");
}

int Fail(const absl::Status& status, int code) {
  std::fprintf(stderr, "refinery-worker: %s\n", refinery::Message(status).c_str());
  return code;
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
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);

  CLI::App app{"Refinery worker: runs the tasks that a coordinator leases to it."};
  app.set_version_flag("--version", REFINERY_VERSION);
  Flags flags;
  AddFlags(app, flags);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  if (auto status = refinery::InitLogging("refinery-worker", flags.log_level); !status.ok()) return Fail(status, 2);
  if (flags.cache.empty()) flags.cache = DefaultCache();
  if (flags.task_program.empty()) flags.task_program = (refinery::ProgramFolder() / "refinery-task").string();
  if (flags.threads == 0) flags.threads = std::max(1u, std::thread::hardware_concurrency() / flags.slots);

  auto metrics = refinery::agent::WorkerMetrics::Serve(flags.metrics_address);
  if (!metrics.ok()) return Fail(metrics.status(), 2);
  if ((*metrics)->port() > 0) spdlog::info("metrics on port {}", (*metrics)->port());
  auto session = refinery::agent::Session::Open({
      .channel = refinery::MakeChannel(flags.coordinator),
      .coordinator = flags.coordinator,
      .cache = flags.cache,
      .id = flags.id,
      .slots = flags.slots,
      .threads = flags.threads,
      .task_program = flags.task_program,
      .drain_grace = std::chrono::milliseconds(static_cast<int64_t>(flags.drain_grace * 1000)),
      .metrics = metrics->get(),
  });
  if (!session.ok()) return Fail(session.status(), 2);

  std::thread([&session, signals] {
    int number = 0;
    sigwait(&signals, &number);
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
