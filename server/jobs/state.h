// server/jobs/state.h
//
// What the coordinator knows about its jobs, and how an event changes it. Pure: no threads, clock, sockets or randomness. The
// durable part of the state is a function of the event log alone: applying the same events again gives the same state, which
// is how a restart works. Members marked "volatile" are about the running process only (timers, progress) and start anew.
// The indexes (queues, leases) follow from the rest and are kept by Apply, so that no command looks at every job or task.
//
// Errors: DATA_LOSS for an event that does not fit the state (a damaged log or one of another version).

#pragma once

#include <chrono>
#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "common/status.h"
#include "refinery/v1/events.pb.h"
#include "refinery/v1/job_service.pb.h"
#include "server/jobs/requests.h"
#include "server/plan/plan.h"

namespace refinery::jobs {

// The time of a command. Only `steady` decides anything; `unix_ms` is written into events for people. (One exception: a job's
// wall-time budget, which must outlive the process and its steady clock.)
struct Now {
  std::chrono::milliseconds steady{0};
  int64_t unix_ms = 0;
};

struct TaskState {
  v1::Task::State state = v1::Task::BLOCKED;
  uint64_t epoch = 0;         // of the last grant; 0 = never granted
  uint32_t attempt = 0;       // of the last grant, from 1
  std::string worker;         // of the last grant
  std::string incarnation;
  v1::Gang gang;              // of the last grant; without an id it was granted alone
  bool resolved = false;      // `spec` is filled in
  v1::TaskSpec spec;          // inputs and settings filled in, from READY on
  std::string digest;         // identity of `spec`; empty when the result must not be reused
  std::string unresolvable;   // why an input can never exist; such a task is settled without output
  v1::ArtifactRef output;     // of a DONE or CACHED task; unset when its result is "no feasible output" (see `error`)
  std::vector<v1::Measurement> measurements;
  v1::TaskError error;        // of the last failed attempt
  double seconds = 0;
  uint64_t peak_memory_bytes = 0;
  v1::ArtifactRef checkpoint;
  uint64_t checkpoint_step = 0;
  uint64_t reported_epoch = 0;  // last attempt whose end the worker reported
  uint32_t infra_failures = 0;
  uint32_t node_failures = 0;
  uint32_t resource_failures = 0;
  uint32_t crashes = 0;         // attempts that ended without a word since the last checkpoint
  std::set<std::string> avoid;  // workers that are not fit for it
  uint32_t losses = 0;          // of its output by the store, after which it ran again
  int unmet_needs = 0;

  // Volatile.
  std::chrono::milliseconds lease_deadline{0};
  std::chrono::milliseconds not_before{0};
  std::chrono::milliseconds ready_since{0};
  std::chrono::milliseconds missing_since{-1};  // its worker speaks, but does not name it; -1 = it does
  std::chrono::milliseconds release_at{-1};     // the lease is taken back then, or at a checkpoint before; -1 = not asked for
  std::string release_reason;
  std::chrono::milliseconds moved{0};           // last progress
  std::chrono::milliseconds slowest_step{0};    // longest time between two of them; 0 = none yet
  v1::TaskProgress progress;
  uint64_t progress_version = 0;
};

// Whether the task has come to its end and will not run again.
inline bool IsSettled(v1::Task::State state) {
  return state == v1::Task::DONE || state == v1::Task::CACHED || state == v1::Task::DEAD || state == v1::Task::CANCELLED;
}
inline bool IsTerminal(v1::Job::State state) {
  return state == v1::Job::SUCCEEDED || state == v1::Job::FAILED || state == v1::Job::CANCELLED;
}

struct JobState {
  std::string id;
  uint64_t created_seq = 0;
  uint64_t last_seq = 0;       // of its last event
  v1::Job::State state = v1::Job::PENDING;
  std::string reason;
  v1::JobCreated created;      // its policy is the current one
  int64_t create_time_ms = 0;
  int64_t end_time_ms = 0;
  int64_t paused_time_ms = 0;  // when it was paused; 0 = it is not
  uint64_t paused_ms = 0;      // in all, without the pause that goes on
  double device_seconds = 0;   // of finished attempts
  uint32_t attempts = 0;
  uint32_t retries = 0;        // of the whole job, by a user
  std::string exhausted;       // the bound of its budget that was reached
  plan::Plan plan;
  std::vector<TaskState> tasks;                   // parallel to plan.tasks
  std::unordered_map<std::string, size_t> index;  // path -> position
  std::vector<std::vector<size_t>> dependents;    // position -> tasks that need it
  std::vector<v1::Trial> trials;                  // by index
  bool study_finished = false;
  std::map<std::string, std::pair<uint32_t, uint32_t>> best;  // selector -> (trial, replicate)
  std::map<std::pair<int, int>, size_t> train_tasks;          // (trial, replicate) -> position
  std::vector<v1::Event> notes;
  v1::ArtifactRef artifact;
  v1::ArtifactRef best_artifact;  // without an exported model: the best adapter so far
  v1::ArtifactRef report;
  std::set<std::string> workers;  // that ran its tasks
  std::map<v1::TaskKind, std::set<size_t>> ready;  // positions of READY tasks by kind; no empty sets
  std::set<size_t> leased;        // positions of LEASED tasks
  size_t settled = 0;
  int dead = -1;                  // position of the first DEAD task

  // Volatile: what Core::Advance has to look at again.
  std::vector<size_t> fresh;      // tasks that became READY
  bool study_changed = true;

  const TaskState* Find(const std::string& path) const;
  TaskState* Find(const std::string& path);
  const std::string& tenant() const;
  int32_t priority() const { return created.policy().priority(); }
  // What a worker must have for a task of `kind`.
  const v1::Requirements& RequirementsOf(v1::TaskKind kind) const;
  bool IsReady(size_t i) const { return tasks[i].state == v1::Task::READY; }
};

// The result of a finished task, for tasks with the same identity.
struct CachedResult {
  v1::ArtifactRef output;
  std::vector<v1::Measurement> measurements;
};

// A job in an index: oldest first.
using JobKey = std::pair<uint64_t, std::string>;  // (created_seq, id)
using LeaseKey = std::pair<std::string, size_t>;  // (job, position of the task)

struct State {
  State() = default;
  State(State&&) = default;
  State& operator=(State&&) = default;

  std::map<std::string, JobState> jobs;
  std::vector<std::string> order;                         // job ids, oldest first
  std::unordered_map<std::string, std::string> requests;  // of JobCreated: request id -> job id
  AnsweredRequests answered;                              // by caller and request id
  std::unordered_map<std::string, CachedResult> results;  // task identity -> result
  std::map<std::string, v1::TenantPolicy> tenants;        // only those that were set
  uint64_t last_seq = 0;

  // Indexes.
  std::set<JobKey> active;                                // jobs that have not ended
  // Jobs with READY tasks that may be granted: by priority (highest first), then tenant.
  std::map<int32_t, std::map<std::string, std::set<JobKey>>, std::greater<>> queues;
  std::set<LeaseKey> leases;                              // every LEASED task
  std::unordered_map<std::string, std::set<LeaseKey>> worker_leases;
  std::unordered_map<std::string, int> running;           // identity -> LEASED tasks that have it
};

// Takes one event in; `code_version` is part of the identity of tasks of jobs that do not name theirs.
Status Apply(State& state, const v1::Event& event, const std::string& code_version);

// The durable state as bytes, the same for equal states; and back. DATA_LOSS for bytes that are damaged or of a newer version.
std::string TakeSnapshot(const State& state);
StatusOr<State> ReadSnapshot(std::string_view bytes, const std::string& code_version);

// "train" for TRAIN.
std::string KindName(v1::TaskKind kind);

// The job as the API shows it; with `tasks` also its tasks. `now` is for the texts that say how long a task still waits.
v1::Job ToProto(const JobState& job, bool with_tasks, const Now& now);

// The durable state as text, in a canonical order: equal states give equal texts.
std::string Dump(const State& state);

}  // namespace refinery::jobs
