// tests/simulation/worker_model.h
//
// A worker as worker/agent is one: synchronizes, runs attempts, uploads before it reports, repeats its reports until it has an
// answer, and stops what its lease may no longer cover. It can crash, be stopped and go on, and be cut off.

#pragma once

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "refinery/v1/worker_service.pb.h"
#include "tests/simulation/world.h"

namespace refinery::simulation {

class WorkerModel {
 public:
  WorkerModel(World* world, int index, uint32_t slots);

  void Start();
  void Crash();
  void SetPaused(bool paused);
  const std::string& id() const { return id_; }

 private:
  struct Attempt {
    v1::Lease lease;
    v1::TaskProgress progress;
    v1::CompleteTaskRequest end;      // what it will report
    int steps = 0;                    // of `total`
    int total = 1;
    Time step = 0;                    // duration of one
    int hangs_at = -1;                // step it never leaves
    bool ended = false;               // its task is over, the report is on its way
    int call = 0;
  };

  // As EventQueue::After, for this life of the worker; waits while it is stopped.
  void Later(Time delay, std::function<void()> action);
  void Synchronize();
  void OnSynchronized(Time sent, const v1::SynchronizeResponse& response);
  Time FenceTime() const;
  void Fence();
  std::string MissingOf(const v1::Lease& lease) const;
  void Begin(const v1::Lease& lease);
  void Step(const std::string& key);
  void Finish(const std::string& key);
  void Report(const std::string& key);
  void CommitCheckpoint(const std::string& key, uint64_t step);
  void Drop(const std::string& key);
  void Say(const std::string& what) const;

  World* const world_;
  const std::string id_;
  const uint32_t slots_;
  int life_ = 0;
  bool up_ = false;
  bool paused_ = false;
  std::vector<std::function<void()>> deferred_;
  std::map<std::string, Attempt> attempts_;  // by token
  int sync_call_ = 0;
  Time heard_ = 0;                           // when the last answer arrived
  Time renewed_ = 0;                         // when the last request that renewed the leases had been sent
  Time backoff_ = 200;
};

}  // namespace refinery::simulation
