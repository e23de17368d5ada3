// worker/agent/task_process.h
//
// One run of the refinery-task program: starts it, reads its events (JSON lines on standard output) and its log (standard
// error) until it ends, and stops it when asked.
//
// Threads: Run() blocks its thread and calls both sinks on it; Stop() may be called from any. The thread that calls Run()
// must live as long as the process: the kernel ends the process with it.

#pragma once

#include <atomic>
#include <chrono>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <string_view>

#include "common/process.h"
#include "common/status.h"
#include "refinery/v1/task.pb.h"

namespace refinery::agent {

struct TaskCommand {
  std::filesystem::path program;
  std::filesystem::path spec, inputs, outputs, checkpoints, cache;
  std::filesystem::path resume;     // empty = from the start
  uint32_t threads = 1;
  std::map<std::string, std::string> environment;   // added to ours
};

class TaskProcess {
 public:
  using EventSink = std::function<void(const v1::TaskEvent&)>;
  using LogSink = std::function<void(std::string_view line)>;

  // How it ended. NOT_FOUND or UNAVAILABLE when it could not be started.
  StatusOr<ExitInfo> Run(const TaskCommand& command, const EventSink& on_event, const LogSink& on_log);
  // SIGTERM to its group, SIGKILL when it is still there after `grace`. Also before Run() has begun.
  void Stop(std::chrono::milliseconds grace);

 private:
  void Pump(Process& process, const EventSink& on_event, const LogSink& on_log);
  void SignalWhenStopped(Process& process);

  std::atomic<int64_t> stop_grace_ms_{-1};   // -1 = not asked to stop
  std::chrono::steady_clock::time_point kill_time_{};
  bool terminated_ = false;
  bool killed_ = false;
};

// How often the kernel has killed a process for lack of memory since boot; 0 where it does not say.
uint64_t OutOfMemoryKills();

}  // namespace refinery::agent
