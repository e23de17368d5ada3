// worker/agent/session.h
//
// A worker's conversation with its coordinator: one Synchronize after the other (a long poll while idle), which brings leases
// and cancellations and takes progress and logs. A coordinator that is away for less than a lease's life does no harm: the
// attempts go on and are adopted again. After that the worker stops them itself, for another worker may have the leases.
//
// Threads: Run() on one; Stop() from any (not from a signal handler).

#pragma once

#include <chrono>
#include <condition_variable>
#include <filesystem>
#include <list>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>

#include "common/status.h"
#include "refinery/v1/worker_service.grpc.pb.h"
#include "worker/agent/artifact_cache.h"
#include "worker/agent/attempt.h"
#include "worker/agent/metrics.h"
#include "worker/agent/port_reserve.h"

namespace refinery::agent {

struct SessionOptions {
  std::shared_ptr<grpc::Channel> channel;
  std::string coordinator;                       // for messages
  std::filesystem::path cache;
  std::string id;                                // empty: "<host>-<n>", the first n that is free in this cache
  uint32_t slots = 1;
  uint32_t threads = 1;                          // per attempt
  std::map<std::string, std::string> labels;     // what jobs may ask for
  std::string address;                           // under which other workers reach this machine; empty: its host name
  std::filesystem::path task_program;
  std::chrono::milliseconds drain_grace{10'000}; // after Stop(), before running attempts are ended
  std::chrono::milliseconds stop_grace{5'000};   // between SIGTERM and SIGKILL for a task
  ArtifactClient::Options transfers;             // tries and waits when artifacts are moved
  WorkerMetrics* metrics = nullptr;
};

class Session {
 public:
  // Locks the worker's place in the cache and clears what an earlier life left there. ALREADY_EXISTS when a running worker
  // has this id there; NOT_FOUND without a task program.
  static StatusOr<std::unique_ptr<Session>> Open(SessionOptions options);
  ~Session();

  // Until Stop(), and all attempts have ended. An error when the coordinator refuses this worker.
  Status Run();
  // Takes no more leases; ends what runs after the grace.
  void Stop();

  const std::string& id() const { return options_.id; }

 private:
  using Clock = std::chrono::steady_clock;

  explicit Session(SessionOptions options);
  Status Lock();
  Status Step();
  StatusOr<v1::SynchronizeResponse> Synchronize(bool idle);
  v1::SynchronizeRequest MakeRequest(bool stopping);
  // What this worker is: all of it when the coordinator has to hear it, otherwise only what changes all the time.
  void Describe(v1::WorkerInfo* worker);
  void Apply(const v1::SynchronizeResponse& response);
  void HandleFailure(const Status& status);
  // From then on the leases may be over: by the clock of the last request that renewed them.
  Clock::time_point FenceTime() const;
  void Fence();
  void Reap();
  void Drain();
  void SayGoodbye();
  bool stopping();
  // Until `wait` has passed, an attempt has ended, or Stop().
  void Sleep(std::chrono::milliseconds wait);

  SessionOptions options_;
  ArtifactCache artifacts_;
  PortReserve ports_;
  AttemptContext context_;
  std::unique_ptr<v1::WorkerService::Stub> stub_;
  v1::WorkerInfo info_;
  bool told_ = false;                            // the coordinator knows info_
  std::string incarnation_;
  uint64_t revision_ = 0;                // of the last request
  int lock_fd_ = -1;

  std::chrono::milliseconds lease_ttl_;
  std::chrono::milliseconds interval_;
  std::chrono::milliseconds backoff_;
  Clock::time_point heard_;                      // when the last answer arrived
  Clock::time_point renewed_;                    // when the last Synchronize that renewed the leases was sent
  bool ever_connected_ = false;
  bool connected_ = false;
  bool drained_ = false;
  std::list<std::unique_ptr<Attempt>> attempts_;

  std::mutex mutex_;                             // guards what follows
  std::condition_variable wake_;
  bool attempt_ended_ = false;
  bool stopping_ = false;
  Clock::time_point stop_time_;
  grpc::ClientContext* poll_ = nullptr;          // the Synchronize that is under way while idle
};

}  // namespace refinery::agent
