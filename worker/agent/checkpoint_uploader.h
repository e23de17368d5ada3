// worker/agent/checkpoint_uploader.h
//
// Uploads and commits an attempt's checkpoints beside the running task. Only the newest waits: when a task makes them faster
// than they can be sent, those in between are left out. A folder is removed once it is committed.
//
// Threads: Submit and Finish from one thread; the callbacks come on the uploader's own.

#pragma once

#include <condition_variable>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "common/status.h"

namespace refinery::agent {

class CheckpointUploader {
 public:
  // Uploads and commits one folder; its error goes to `on_error` and the work goes on.
  using Commit = std::function<Status(const std::filesystem::path& folder, uint64_t step)>;
  using ErrorSink = std::function<void(const Status&)>;

  CheckpointUploader(std::filesystem::path folder, Commit commit, ErrorSink on_error);
  ~CheckpointUploader();

  // The checkpoint <folder>/<name> is complete. A name with '/' or ".." is an error.
  void Submit(const std::string& name, uint64_t step);
  // Ends the thread, after what waits has been committed if `flush`.
  void Finish(bool flush);

 private:
  struct Checkpoint {
    std::filesystem::path folder;
    uint64_t step = 0;
  };
  void Loop();

  const std::filesystem::path folder_;
  const Commit commit_;
  const ErrorSink on_error_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::optional<Checkpoint> waiting_;
  bool closing_ = false;
  std::thread thread_;
};

}  // namespace refinery::agent
