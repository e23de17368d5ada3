// tests/simulation/coordinator_model.h
//
// The coordinator around the real core and scheduler, as server/api/coordinator.cc is, with simulated disk, clock and network:
// it takes in what has arrived, lets the core decide, writes the events, and only then answers. It can crash between any two of
// these, stand still, and start again from snapshot and log.

#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "server/jobs/core.h"
#include "server/scheduler/schedule.h"
#include "tests/simulation/auditor.h"
#include "tests/simulation/event_queue.h"
#include "tests/simulation/fake_log.h"
#include "tests/simulation/random.h"

namespace refinery::simulation {

struct CoordinatorSettings {
  std::chrono::milliseconds lease_ttl{30'000};
  Time tick = 500;             // between two turns without a message
  Time least_turn = 0;         // turns do not follow each other more closely
  Time long_poll = 20'000;
  Time synchronize = 1'000;    // while busy
  Time fsync_low = 1, fsync_high = 4;
  Time upkeep_every = 0;       // between two looks for lost blobs; 0 = never
  uint64_t compact_every = 0;  // events; 0 = keep the whole log
  bool compare = true;         // replay the log and compare at every restart
  Mutations mutations;
  bool verbose = false;
};

class CoordinatorModel {
 public:
  // What a command may touch; `replies` run when the events are durable.
  struct Turn {
    jobs::Core& core;
    jobs::Now now;
    jobs::Events events;
    std::vector<std::function<void()>> replies;
  };
  using Command = std::function<void(Turn&)>;
  using PollReply = std::function<void(const v1::SynchronizeResponse&)>;

  CoordinatorModel(const CoordinatorSettings& settings, uint64_t seed, EventQueue* queue, Auditor* auditor, Result* result);

  // A message arrives. False: nobody listens, the caller knows at once.
  bool Deliver(Command command);
  void Synchronize(const v1::SynchronizeRequest& request, PollReply reply, Turn& turn);

  void Start();
  // Now, and starts again after `downtime`.
  void Crash(Time downtime);
  // Where the next turn that has something to write ends.
  enum class CrashPoint { kNone, kBeforeWrite, kInWrite, kBeforeReplies, kAmongReplies };
  void CrashAt(CrashPoint point, Time downtime) {
    crash_point_ = point;
    downtime_ = downtime;
  }
  bool up() const { return core_ != nullptr; }
  void set_paused(bool paused);
  void set_disk(bool full, Time extra_fsync);
  void JumpClock(int64_t ms) { unix_jump_ += ms; }
  // Compares the live state with the replayed log, when no events are on their way to it.
  void Compare();
  const jobs::Core& core() const { return *core_; }
  size_t log_bytes() const { return log_.size(); }

 private:
  struct Poll {
    std::string incarnation;
    uint32_t free_slots = 0;
    Time deadline = 0;
    v1::SynchronizeResponse response;
    PollReply reply;
  };
  jobs::CoreOptions MakeCoreOptions() const;
  jobs::Now Clocks() const;
  // As EventQueue::After, for this life of the process; waits while it stands still.
  void Later(Time delay, std::function<void()> action);
  void ScheduleTurn(Time delay);
  void RunTurn();
  void Grant(Turn& turn);
  void TakeWritten();
  void AnswerPolls(Turn& turn);
  void Commit(Turn turn);
  void EndCommit(const std::vector<std::function<void()>>& replies, uint64_t seq);
  void MaybeCompact();

  const CoordinatorSettings settings_;
  EventQueue* const queue_;
  Auditor* const auditor_;
  Result* const result_;
  Random disk_random_;
  FakeLog log_;
  std::string snapshot_;
  uint64_t snapshot_seq_ = 0;

  std::unique_ptr<jobs::Core> core_;  // null: down
  std::vector<Command> inbox_;
  std::map<std::string, Poll> polls_;                    // by worker
  std::map<std::string, v1::WorkerInfo> workers_;        // that have spoken
  std::map<std::string, Time> seen_;
  int life_ = 0;             // of the process; what an earlier one planned does not happen
  CrashPoint crash_point_ = CrashPoint::kNone;
  Time downtime_ = 0;
  std::vector<std::function<void()>> deferred_;  // until it goes on
  bool paused_ = false;
  bool committing_ = false;
  bool disk_full_ = false;
  Time turn_at_ = -1;        // of the next turn; -1 = none is planned
  Time extra_fsync_ = 0;
  Time last_turn_ = -1'000'000;
  Time last_upkeep_ = 0;
  int64_t unix_jump_ = 0;
  Time steady_offset_ = 0;   // a steady clock starts anywhere
};

}  // namespace refinery::simulation
