#include "worker/agent/checkpoint_uploader.h"

namespace refinery::agent {

CheckpointUploader::CheckpointUploader(std::filesystem::path folder, Commit commit, ErrorSink on_error)
    : folder_(std::move(folder)),
      commit_(std::move(commit)),
      on_error_(std::move(on_error)),
      thread_([this] { Loop(); }) {}

CheckpointUploader::~CheckpointUploader() { Finish(/*flush=*/false); }

void CheckpointUploader::Submit(const std::string& name, uint64_t step) {
  if (name.empty() || name == "." || name == ".." || name.find('/') != std::string::npos) {
    on_error_(InvalidArgument("the task named a checkpoint '", name, "', which is not the name of a folder"));
    return;
  }
  std::lock_guard<std::mutex> lock(mutex_);
  waiting_ = Checkpoint{.folder = folder_ / name, .step = step};
  changed_.notify_all();
}

void CheckpointUploader::Finish(bool flush) {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (!flush) waiting_.reset();
    closing_ = true;
    changed_.notify_all();
  }
  if (thread_.joinable()) thread_.join();
}

void CheckpointUploader::Loop() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    changed_.wait(lock, [&] { return closing_ || waiting_.has_value(); });
    if (!waiting_.has_value()) return;
    Checkpoint checkpoint = *std::move(waiting_);
    waiting_.reset();
    lock.unlock();
    if (Status status = commit_(checkpoint.folder, checkpoint.step); !status.ok()) on_error_(status);
    std::error_code error;
    std::filesystem::remove_all(checkpoint.folder, error);
    lock.lock();
  }
}

}  // namespace refinery::agent
