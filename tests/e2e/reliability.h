// tests/e2e/reliability.h
//
// What the reliability program (reliability.cc) is made of: real refineryd and refinery-worker processes on loopback, and checks that
// print a row each.
//
// Threads: as noted.

#pragma once

#include <grpcpp/channel.h>

#include <atomic>
#include <chrono>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "common/process.h"
#include "common/status.h"
#include "refinery/v1/job_service.grpc.pb.h"
#include "refinery/v1/worker_service.grpc.pb.h"

namespace refinery::reliability {

using Clock = std::chrono::steady_clock;
using Milliseconds = std::chrono::milliseconds;

inline double SecondsSince(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }
inline void Sleep(double seconds) { std::this_thread::sleep_for(std::chrono::duration<double>(seconds)); }

// How thorough: the quick form runs in `make test`, the full one in `make reliability`.
struct Settings {
  std::filesystem::path folder;
  bool full = false;
  bool inside_namespace = false;   // started by Partition
  Milliseconds lease_ttl{2'000};   // full: 30 s
  double away_seconds = 1.2;       // full: 20
  int kills = 12;                  // full: 200
};

// Prints rows; any thread.
class Checks {
 public:
  void Row(const std::string& name, double value, const char* unit, const std::string& bound, bool ok);
  void Skip(const std::string& name, const std::string& why);
  // Rows that another program printed.
  void Relay(const std::string& rows, bool ok);
  bool ok() const { return ok_; }

 private:
  std::mutex mutex_;
  bool ok_ = true;
};

// A refineryd that is started again, on the same address, whenever it ends by itself.
class Coordinator {
 public:
  struct Options {
    std::filesystem::path state;
    std::string listen = "127.0.0.1:0";
    bool own_disk = false;  // the state is on a disk made for it; else how full the machine's is does not matter
    std::vector<std::string> flags;
    std::map<std::string, std::string> environment;        // always
    std::map<std::string, std::string> first_environment;  // only at the first start
  };
  // Waits until it serves, or has ended for the first time.
  explicit Coordinator(Options options);
  ~Coordinator();
  const std::string& address() const { return address_; }
  int port() const;
  // A connection that tries again ten times a second.
  std::shared_ptr<grpc::Channel> Connect() const;
  void Kill();               // SIGKILL; stays away until Start
  void Start();
  int StopGently();          // SIGTERM; its exit code (128 + signal)
  int deaths() const { return deaths_; }    // by itself
  int last_code() const { return last_code_; }

 private:
  void Launch(bool first);
  void Supervise();

  const Options options_;
  std::string address_;
  std::mutex mutex_;
  std::unique_ptr<Process> process_;  // guarded
  bool wanted_ = true;                // guarded
  std::atomic<bool> stopping_{false};
  std::atomic<int> deaths_{0};
  std::atomic<int> last_code_{0};
  std::thread supervisor_;
};

// refinery-worker with the fake task program of the tests; `prefix` is the program and arguments that start it.
std::unique_ptr<Process> StartWorker(const std::string& address, const std::filesystem::path& cache, const std::string& id, int slots,
                                     const std::vector<std::string>& prefix = {});

// The address without a coordinator's loss: calls that end UNAVAILABLE or DEADLINE_EXCEEDED are made again until `limit` is over.
template <typename Call>
Status Persist(Call call, double limit = 30) {
  const Clock::time_point start = Clock::now();
  for (;;) {
    const Status status = call();
    const bool lost = absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status) || absl::IsCancelled(status);
    if (!lost || SecondsSince(start) > limit) return status;
    Sleep(0.05);
  }
}

// A job whose first task runs `uri` in the fake task program ("sleep:5"), with `shards` tasks behind it.
v1::Recipe Recipe(const std::string& uri, uint32_t shards, uint64_t seed);
// Creates it with the files it needs; persists through restarts.
StatusOr<std::string> Submit(const std::shared_ptr<grpc::Channel>& channel, const v1::Recipe& recipe, const std::string& request_id);
StatusOr<v1::Job> Describe(const std::shared_ptr<grpc::Channel>& channel, const std::string& job);
// The task `path` of the job; waits until `wanted` holds. DEADLINE_EXCEEDED after `limit` seconds.
StatusOr<v1::Task> Await(const std::shared_ptr<grpc::Channel>& channel, const std::string& job, const std::string& path,
                         const std::function<bool(const v1::Task&)>& wanted, double limit);
// Plays every task of every job as a worker until `job` has ended; persists.
StatusOr<v1::Job> PlayToTheEnd(const std::shared_ptr<grpc::Channel>& channel, const std::string& job, double limit = 60);
// path -> digest of what each task made.
std::map<std::string, std::string> OutputsOf(const v1::Job& job);

void Kills(const Settings& settings, Checks& checks);
void Away(const Settings& settings, Checks& checks);
void LostWorkers(const Settings& settings, Checks& checks);
void BadNetwork(const Settings& settings, Checks& checks);
void Partition(const Settings& settings, Checks& checks);
void StaleCommits(const Settings& settings, Checks& checks);
void Failpoints(const Settings& settings, Checks& checks);
void BlobLoss(const Settings& settings, Checks& checks);
void SmallDisk(const Settings& settings, Checks& checks);

}  // namespace refinery::reliability
