// tests/simulation/options.h
//
// What one simulated run is made of. Everything that is not written here follows from the seed, so a run can be repeated, and a
// failing one shrunk: fewer jobs, fewer workers, fewer faults, while it still fails.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "server/jobs/core.h"

namespace refinery::simulation {

using Time = int64_t;  // milliseconds since the start of the run

enum FaultKind : uint32_t {
  kCoordinatorCrash = 1u << 0,   // at any point: before the append, in the middle of it, before the replies
  kCoordinatorPause = 1u << 1,   // stands still, also for longer than a lease
  kWorkerCrash = 1u << 2,        // and comes back as a new incarnation
  kWorkerPause = 1u << 3,        // SIGSTOP
  kPartition = 1u << 4,          // nothing passes, in one direction or both
  kMessageLoss = 1u << 5,        // requests and replies
  kMessageDuplication = 1u << 6,
  kMessageDelay = 1u << 7,       // and so their order
  kClockJump = 1u << 8,          // of the coordinator's Unix clock, either way
  kSlowDisk = 1u << 9,
  kFullDisk = 1u << 10,
  kTaskFailure = 1u << 11,       // attempts that end with an error
  kTaskHang = 1u << 12,          // attempts that stop moving
  kUserAction = 1u << 13,        // pause, resume, cancel, kill, retry, another priority
  kBlobLoss = 1u << 14,          // results whose bytes vanish from the store
  kAllFaults = (1u << 15) - 1,
};
std::string FaultName(uint32_t kind);

// Bugs planted on purpose; each must be found. The first two are in the core (CoreOptions::Mutations), the others here.
struct Mutations {
  jobs::CoreOptions::Mutations core;
  bool commit_before_blob = false;   // workers report outputs that are not uploaded yet, and nobody looks
  bool reply_before_append = false;  // replies leave before the events are durable
  bool no_fence = false;             // workers go on when their lease may have run out
};

struct SimulationOptions {
  uint64_t seed = 1;
  // 0 and kAllFaults: chosen by the seed.
  int jobs = 0;
  int workers = 0;
  uint32_t faults = kAllFaults;      // kinds that may happen; the seed picks a subset of them
  std::vector<int> only_faults;      // positions in the list of planned faults that do happen; empty = all
  bool no_planned_faults = false;    // none of that list
  Mutations mutations;

  // The long run: a fleet over a day. 0 = a short run.
  double hours = 0;
  double faults_per_hour = 0.01;     // of each worker
  int shards = 200;                  // tasks of the widest stage of each job of the long run
  bool verbose = false;
};

struct Result {
  bool ok = true;
  std::string failure;               // the broken invariant
  Time time = 0;                     // simulated
  uint64_t events = 0;               // of the log
  uint64_t jobs = 0;
  uint64_t succeeded = 0;
  uint64_t attempts = 0;
  uint64_t faults = 0;               // that took effect
  uint64_t restarts = 0;             // of the coordinator
  uint64_t late_commits = 0;         // with a stale epoch that reached the coordinator
  uint64_t late_commits_refused = 0;
  uint64_t reassigned = 0;           // tasks of dead, stopped or cut-off workers
  Time slowest_reassignment = 0;     // from the last word of the worker to READY again
  int planned_faults = 0;            // length of the list that only_faults picks from
  int used_jobs = 0;
  int used_workers = 0;
  uint32_t used_faults = 0;
};

// One run. Returns at the first broken invariant.
Result Simulate(const SimulationOptions& options);

// The smallest options found that still break the same invariant.
SimulationOptions Shrink(const SimulationOptions& options, const Result& failed);

// The arguments of refinery_simulation that repeat the run.
std::string CommandOf(const SimulationOptions& options);

}  // namespace refinery::simulation
