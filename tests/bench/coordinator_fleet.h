// tests/bench/coordinator_fleet.h
//
// A fleet for measuring a real refineryd over loopback gRPC: the daemon as a child process, jobs of some thousand tasks, and
// workers that play their tasks. The workers use gRPC's callback clients, so a thousand of them need no thousand threads.
//
// Errors: whatever must not happen in a benchmark ends the program with a line that says what happened (Must).
// Threads: gRPC's; everything shared is atomic or guarded.

#pragma once

#include <grpcpp/channel.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <queue>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "common/process.h"
#include "common/status.h"
#include "refinery/v1/job_service.grpc.pb.h"
#include "refinery/v1/worker_service.grpc.pb.h"

namespace refinery::bench {

using Clock = std::chrono::steady_clock;

// Ends the program when `status` is not OK.
void Must(const Status& status, const char* doing);
template <typename T>
T Must(StatusOr<T> value, const char* doing) {
  Must(value.status(), doing);
  return *std::move(value);
}

// refineryd of the folder that holds this program, on `state`.
class Daemon {
 public:
  // Starts it and waits until it serves.
  explicit Daemon(std::filesystem::path state, std::vector<std::string> flags = {});
  ~Daemon() { Kill(); }
  void Kill();  // SIGKILL
  void Stop();  // SIGTERM, and waits
  const std::string& address() const { return address_; }
  double ResidentMib() const;
  double CpuSeconds() const;
  // From the start of the process to the first answered call.
  double seconds_to_serving() const { return seconds_to_serving_; }
  // A connection of its own, shared with nobody.
  std::shared_ptr<grpc::Channel> Connect() const;

 private:
  std::filesystem::path state_;
  std::string address_;
  double seconds_to_serving_ = 0;
  std::unique_ptr<Process> process_;
};

// A recipe with `shards` synthesize tasks, which become ready together, and as many critiques behind them.
v1::Recipe WideRecipe(uint64_t seed, uint32_t shards);

// Digest of a small artifact that every played task returns; uploaded by the first call.
std::string UploadOutput(const std::shared_ptr<grpc::Channel>& channel);

// Submits `count` jobs of `shards` synthesize tasks and plays their imports, so that count * shards tasks are ready.
std::vector<std::string> SubmitJobs(const Daemon& daemon, uint32_t count, uint32_t shards, const std::string& output);

// Calls functions at their time, on one thread.
class Timer {
 public:
  Timer();
  ~Timer();
  void At(Clock::time_point time, std::function<void()> call);

 private:
  struct Entry {
    Clock::time_point time;
    std::function<void()> call;
    bool operator<(const Entry& other) const { return time > other.time; }
  };
  std::mutex mutex_;
  std::condition_variable wake_;
  std::priority_queue<Entry> entries_;
  bool stopping_ = false;
  std::thread thread_;
};

// What all simulated workers of a measurement share.
struct FleetCounts {
  std::atomic<uint64_t> granted{0};
  std::atomic<uint64_t> completed{0};
  std::atomic<uint64_t> failed_calls{0};
  std::atomic<int> open_calls{0};
  std::atomic<bool> stopping{false};
  std::mutex mutex;
  std::vector<double> grant_ms;   // guarded: from asking as an idle worker to holding the lease
  void WaitForCalls();            // after stopping = true
};

// One worker. Takes up to `slots` leases at a time. With `mean_seconds` 0 it completes each at once; otherwise it runs one task
// for an exponentially distributed time, says so every second as the agent does, and measures how long it waits for the next.
class SimulatedWorker {
 public:
  struct Options {
    std::shared_ptr<grpc::Channel> channel;
    std::string id;
    std::string output;          // digest that its tasks return
    uint32_t slots = 1;
    double mean_seconds = 0;
    uint64_t seed = 0;
    Timer* timer = nullptr;      // needed with mean_seconds
    FleetCounts* counts = nullptr;
  };
  explicit SimulatedWorker(Options options);
  void Start() { Ask(); }

 private:
  struct SynchronizeCall;
  struct CompleteCall;
  void Ask();
  void Renew();
  void Work();
  void Send(std::unique_ptr<SynchronizeCall> call, std::function<void(const v1::SynchronizeResponse&, double)> answered);
  void Granted(const v1::SynchronizeResponse& response, double seconds);
  void Complete(const v1::LeaseToken& token);

  const Options options_;
  std::unique_ptr<v1::WorkerService::Stub> stub_;
  std::atomic<int> outstanding_{0};
  v1::LeaseToken running_;
  Clock::time_point end_;
  std::mt19937_64 random_;
};

// The p-quantile of `values` (0 for none).
double Quantile(std::vector<double> values, double p);

}  // namespace refinery::bench
