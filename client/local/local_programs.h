// client/local/local_programs.h
//
// The coordinator and the worker that `refinery run` brings with it: started beside this program on loopback with one state
// folder, in sessions of their own, so that they outlive a Ctrl-C. <state>/run.json says which processes they are; whoever
// comes later finds them there, starts again what is dead, and the last one to leave stops them.
//
// Errors: FAILED_PRECONDITION with the last log lines when a program does not come up or dies again and again.
// Threads: one.

#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>

#include <sys/types.h>

#include "common/process.h"
#include "common/status.h"

namespace refinery::client {

struct LocalOptions {
  std::filesystem::path state;
  std::filesystem::path programs;      // folder with refineryd, refinery-worker, refinery-task; default: this program's
  std::filesystem::path worker_cache;  // empty = the worker's default
  std::filesystem::path task_program;  // empty = refinery-task beside the worker
  bool worker = true;                  // false: the coordinator alone
};

class LocalPrograms {
 public:
  static StatusOr<std::unique_ptr<LocalPrograms>> Open(LocalOptions options);
  ~LocalPrograms();

  // Starts what does not run yet and waits until the coordinator answers.
  Status Start();
  const std::string& address() const { return address_; }
  // Whether Start() found both running.
  bool attached() const { return attached_; }

  // Call a few times a second: starts a dead program again. Returns what happened, or an empty text.
  StatusOr<std::string> Supervise();
  // Stops both, unless another `refinery run` uses them. Returns whether they were stopped.
  bool StopIfLast();

  // The request id under which this content was submitted here last; empty if never.
  StatusOr<std::string> RequestId(const std::string& content_digest);
  Status SetRequestId(const std::string& content_digest, const std::string& request_id);

 private:
  struct Program {
    pid_t pid = 0;
    uint64_t start_time = 0;
  };
  struct Record;

  explicit LocalPrograms(LocalOptions options);
  StatusOr<Record> Load();
  Status Save(const Record& record);
  bool Alive(const Program& program);
  StatusOr<Program> Launch(const std::string& name, const std::string& address);
  Status AwaitCoordinator(const Program& program, const std::string& address);
  // Starts what is dead in `record`; the names of what it started.
  StatusOr<std::string> StartMissing(Record& record);
  std::string LogTail(const std::string& name) const;
  std::filesystem::path LogFile(const std::string& name) const;

  LocalOptions options_;
  std::string address_;
  bool attached_ = false;
  int users_fd_ = -1;
  int restarts_ = 0;
  std::map<pid_t, std::unique_ptr<Process>> children_;   // those that we started, to reap them
};

// ~/.local/state/refinery/<recipe name>, or below XDG_STATE_HOME.
std::filesystem::path DefaultStateFolder(const std::string& recipe_name);

}  // namespace refinery::client
