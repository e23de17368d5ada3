// tests/bench/coordinator_load.h
//
// Two loads of the coordinator's benchmark: a state folder with a long history, and readers of a job's events.
//
// Threads: a Watcher is filled by gRPC's threads, a SlowWatcher has one of its own.

#pragma once

#include <grpcpp/channel.h>

#include <atomic>
#include <filesystem>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "refinery/v1/job_service.grpc.pb.h"

namespace refinery::bench {

struct LongLogOptions {
  uint32_t jobs = 1;
  uint32_t shards = 1;
  uint64_t events = 0;          // at least
  uint64_t after_snapshot = 0;  // of them, after the newest snapshot
};
struct LongLog {
  uint64_t events = 0;
  uint64_t tasks = 0;
  std::string last_job;
  uint32_t last_job_done = 0;  // tasks
};
// Writes the event log that a coordinator would have written: the real core decides, workers are played, every task commits
// checkpoints until there are enough events. The tasks of the jobs are done but for those that wait for all others.
LongLog MakeLongLog(const std::filesystem::path& state, const LongLogOptions& options);

// Reads a job's events as fast as they come.
class Watcher {
 public:
  Watcher(const std::shared_ptr<grpc::Channel>& channel, const std::string& job);
  ~Watcher();
  std::vector<uint64_t> Seen();
  void Cancel();

 private:
  class Reader;
  std::unique_ptr<v1::JobService::Stub> stub_;
  std::shared_ptr<Reader> reader_;
};

// Reads so many bytes a second.
class SlowWatcher {
 public:
  SlowWatcher(const std::shared_ptr<grpc::Channel>& channel, const std::string& job, double bytes_per_second);
  ~SlowWatcher();
  // Cuts the stream; what was read until then.
  std::vector<uint64_t> Stop();

 private:
  void Run(const std::string& job, double bytes_per_second);

  std::unique_ptr<v1::JobService::Stub> stub_;
  grpc::ClientContext context_;
  std::atomic<bool> stopping_{false};
  std::vector<uint64_t> seen_;
  std::thread thread_;
};

// Every event of the job after `after_seq` that there is now.
std::vector<uint64_t> EventsOf(const std::shared_ptr<grpc::Channel>& channel, const std::string& job, uint64_t after_seq);

// Takes one lease and completes it with `output`.
void PlayOne(const std::shared_ptr<grpc::Channel>& channel, const std::string& output);

}  // namespace refinery::bench
