// server/api/fleet.h
//
// The workers as the coordinator sees them right now: who they are, when they last spoke, and the long poll each has open.
// Nothing here is durable; after a restart the workers report themselves again.
//
// Threads: the coordinator's loop only.

#pragma once

#include <chrono>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "common/status.h"
#include "refinery/v1/worker_service.pb.h"
#include "server/scheduler/schedule.h"

namespace refinery::api {

using Milliseconds = std::chrono::milliseconds;

// A Synchronize call that waits for its answer.
struct Poll {
  std::string worker;
  std::string incarnation;
  uint32_t free_slots = 0;
  Milliseconds deadline{0};             // answered then at the latest
  v1::SynchronizeResponse* response = nullptr;
  std::function<void(const Status&)> answer;  // sends *response, or the error; called once, after the commit
};

class Fleet {
 public:
  explicit Fleet(Milliseconds lease_ttl) : lease_ttl_(lease_ttl) {}

  // Takes in what a worker says of itself. False when it was brief and this incarnation has not said the rest yet: it must, and until
  // then nothing is known of what it has.
  bool Seen(const v1::SynchronizeRequest& request, Milliseconds now);

  // Keeps the poll until Take. An older poll of the same worker is answered at once, by the returned function.
  std::function<void(const Status&)> Open(Poll poll);
  // Forgets the poll that writes into `response`, whose caller went away; returns its answer (empty when it was taken).
  std::function<void(const Status&)> Close(const v1::SynchronizeResponse* response, Milliseconds now);

  // Those that live, with the room that their polls offer; valid until the next change.
  std::vector<scheduler::Worker> Workers(Milliseconds now) const;
  // Whether a poll is open that could take a lease.
  bool HasFree() const;
  // What is known of it; null when nothing is.
  const v1::WorkerInfo* InfoOf(const std::string& worker) const;
  // To add something to its answer.
  Poll* PollOf(const std::string& worker);
  // With `drain` the worker counts as draining, whatever it says of itself; kept also while the worker is away.
  void Drain(const std::string& worker, bool drain);
  // Removes and returns the polls that have something to say or whose time is over; with `all` every one.
  std::vector<Poll> Take(Milliseconds now, bool all);

  std::vector<v1::WorkerInfo> List(Milliseconds now) const;
  // Longest silence of a worker that is not lost; one whose poll is open is not silent.
  Milliseconds HeartbeatAge(Milliseconds now) const;
  // Forgets workers that were lost long ago.
  void Forget(Milliseconds now);

 private:
  struct Worker {
    v1::WorkerInfo info;
    std::string incarnation;  // that said it; empty: none did
    std::vector<std::string> running;
    uint32_t slots = 0;       // the most that were free or taken in a message of this incarnation
    Milliseconds last_seen{0};
  };
  bool IsLost(const std::string& id, const Worker& worker, Milliseconds now) const;

  const Milliseconds lease_ttl_;
  std::map<std::string, Worker> workers_;
  std::map<std::string, Poll> polls_;  // by worker
  std::set<std::string> drained_;      // by an operator
  bool something_to_say_ = false;      // a poll may have an answer
  Milliseconds next_deadline_{0};      // no poll's is earlier
};

}  // namespace refinery::api
