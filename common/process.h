// common/process.h
//
// Child processes: started with posix_spawn (gRPC's threads make a plain fork unsafe), each in its own process group, so that
// a signal reaches all it started and a Ctrl-C on the terminal does not.
//
// Errors: NOT_FOUND when the program does not exist, UNAVAILABLE when it cannot be started, both with the path.
// Threads: a Process is used by one thread, but for Signal(), which any thread may call.

#pragma once

#include <sys/types.h>

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "common/status.h"

namespace refinery {

struct ProcessOptions {
  std::vector<std::string> command;                  // program and arguments
  std::map<std::string, std::string> environment;    // added to ours
  bool pipes = true;                                 // read its output through stdout_fd() and stderr_fd(), or ...
  std::filesystem::path log;                         // ... append both to this file (only with pipes = false)
  bool new_session = false;                          // detached from the terminal; it outlives us
};

// How a process ended, from wait4.
struct ExitInfo {
  int code = 0;                  // exit code; 0 when ended by a signal
  int signal = 0;                // 0 = it exited by itself
  uint64_t peak_memory_bytes = 0;
  double cpu_seconds = 0;
};

class Process {
 public:
  static StatusOr<std::unique_ptr<Process>> Start(const ProcessOptions& options);
  // Kills the group of a process that was not waited for, unless it has its own session.
  ~Process();
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  pid_t pid() const { return pid_; }
  int stdout_fd() const { return stdout_fd_; }       // -1 without pipes
  int stderr_fd() const { return stderr_fd_; }
  // Blocks until it ends.
  ExitInfo Wait();
  // Whether it has ended; it stays to be waited for, and Signal still reaches its group.
  bool Ended();
  // How it ended, if it has; does not block.
  std::optional<ExitInfo> TryWait();
  // Sends `signal` to its process group; nothing when it has been waited for.
  void Signal(int signal);

 private:
  Process() = default;
  std::optional<ExitInfo> WaitWith(int flags);

  pid_t pid_ = -1;
  int stdout_fd_ = -1;
  int stderr_fd_ = -1;
  bool own_session_ = false;
  std::mutex mutex_;             // guards exit_ against a signal to a reused pid
  std::optional<ExitInfo> exit_;
};

// The folder that holds the running program, for the programs beside it.
std::filesystem::path ProgramFolder();
// When process `pid` started, in clock ticks since boot; 0 when there is none. With the pid it names a process for ever.
uint64_t ProcessStartTime(pid_t pid);
// Signals a process of another start of ours and waits until it is gone; after `grace` with SIGKILL. False if it lives on.
bool StopProcess(pid_t pid, uint64_t start_time, std::chrono::milliseconds grace);

}  // namespace refinery
