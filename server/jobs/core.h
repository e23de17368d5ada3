// server/jobs/core.h
//
// The coordinator's decisions: (state, command, now) -> (events, reply). Pure like the state beneath it; the caller owns
// threads, clock, log and network. Each command takes its events in at once and appends them to `events`; the caller must
// write them to the log before it lets anyone see the reply, and must stop the process when that fails.
//
//   Core core(options);
//   for (event in the log) core.Replay(event);      // restart
//   core.StartGrace(now);                           // running attempts get one lease time to report themselves
//   core.CreateJob(...), core.Synchronize(...), core.Complete(...), core.Tick(now, ...), ...
//
// Errors: as the API's: INVALID_ARGUMENT, NOT_FOUND, FAILED_PRECONDITION, ALREADY_EXISTS, ABORTED for a stale lease.

#pragma once

#include <chrono>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "common/limits.h"
#include "common/status.h"
#include "refinery/v1/job_service.pb.h"
#include "refinery/v1/worker_service.pb.h"
#include "server/jobs/state.h"

namespace refinery::jobs {

using Events = std::vector<v1::Event>;

struct CoreOptions {
  std::chrono::milliseconds lease_ttl = limits::kLeaseTtl;
  std::chrono::milliseconds retry_backoff{1'000};  // before the second attempt; doubled for each further one
  std::string code_version;                        // part of every task's identity
  // Whether every blob of an artifact is in the store; a cached result without its bytes is of no use.
  std::function<bool(const std::string& digest)> is_complete = [](const std::string&) { return true; };
};

class Core {
 public:
  explicit Core(CoreOptions options) : options_(std::move(options)) {}

  // Takes in one event of the log, at start.
  Status Replay(const v1::Event& event);
  // After the replay: every lease counts as just renewed, and whatever the log left half-done goes on.
  void StartGrace(const Now& now, Events* events);

  struct NewJob {
    std::string id;  // chosen by the caller, who has randomness
    v1::JobCreated created;
  };
  // Returns the job's id: an earlier one when the request id is known. ALREADY_EXISTS when that one had another recipe.
  StatusOr<std::string> CreateJob(const NewJob& job, const Now& now, Events* events);
  // Idempotent; a job that has ended stays as it is.
  Status CancelJob(const std::string& id, const std::string& reason, const Now& now, Events* events);

  struct Report {
    google::protobuf::RepeatedPtrField<v1::LeaseToken> cancel;  // attempts the worker must stop and forget
  };
  // What a worker says of itself: renews its leases, takes progress and notes in, adopts attempts that survived a restart.
  Report Synchronize(const v1::SynchronizeRequest& request, const Now& now, Events* events);

  // READY tasks whose time has come, oldest job first, then in the plan's order. Of tasks with the same identity only one at
  // a time: the others take its result.
  struct ReadyTask {
    std::string job;
    std::string path;
    v1::TaskKind kind = v1::TASK_KIND_UNSPECIFIED;
    std::set<std::string> avoid;   // workers
    std::set<std::string> worked;  // workers that ran tasks of this job
  };
  std::vector<ReadyTask> ReadyTasks(const Now& now, size_t limit) const;
  // Grants a READY task. NOT_FOUND when it is not READY any more (its result may have come out of the cache meanwhile).
  StatusOr<v1::Lease> Grant(const std::string& job, const std::string& path, const std::string& worker,
                            const std::string& incarnation, const Now& now, Events* events);

  // ABORTED when the lease is not the task's current one; repeating an accepted call is OK and changes nothing.
  Status Complete(const v1::CompleteTaskRequest& request, const Now& now, Events* events);
  Status CommitCheckpoint(const v1::CommitCheckpointRequest& request, const Now& now, Events* events);

  // Expires leases whose time is over. Call at least once a second.
  void Tick(const Now& now, Events* events);

  // Jobs whose tasks are all done and whose report is to be written; the caller makes it and calls WriteReport. A report that
  // a crash swallowed is asked for again.
  std::vector<std::string> JobsWithoutReport() const;
  Status WriteReport(const std::string& job, const v1::ArtifactRef& report, const Now& now, Events* events);
  // Ends a job that cannot go on for a reason outside its tasks.
  void Fail(const std::string& job, const std::string& reason, const Now& now, Events* events);

  // NOT_FOUND; unique prefixes are accepted, INVALID_ARGUMENT lists the candidates of an ambiguous one.
  StatusOr<const JobState*> FindJob(const std::string& id_or_prefix) const;
  // The attempt a lease token stands for; null when it is not the task's last grant.
  const TaskState* AttemptOf(const v1::LeaseToken& token) const;
  const State& state() const { return state_; }
  uint64_t stale_commits() const { return stale_commits_; }

 private:
  JobState& Job(const std::string& id) { return state_.jobs.at(id); }
  // Gives the event its number and time, takes it in and hands it out.
  void Emit(const std::string& job, v1::Event event, const Now& now, Events* events);
  // Everything that follows by itself: trials, cached results, the end of the job.
  void Advance(const std::string& id, const Now& now, Events* events);
  bool AdvanceStudy(JobState& job, const Now& now, Events* events);
  bool AdvanceReady(JobState& job, const Now& now, Events* events);
  bool TakeFromCache(JobState& job, size_t i, const Now& now, Events* events);
  bool AdvanceEnd(JobState& job, const Now& now, Events* events);
  void EmitJobFinished(const JobState& job, v1::JobFinished::Outcome outcome, const std::string& reason, const Now& now,
                       Events* events);
  void EmitFailed(const JobState& job, size_t i, const v1::TaskError& error, bool retry, const Now& now, Events* events);
  void EmitExpired(const JobState& job, size_t i, const std::string& reason, const Now& now, Events* events);
  void TakeNotes(JobState& job, const std::string& path, const google::protobuf::RepeatedPtrField<v1::Note>& notes,
                 const Now& now, Events* events);
  Status CompleteWithError(JobState& job, size_t i, v1::TaskError error, const Now& now, Events* events);
  // The task that `token` leases now; ABORTED otherwise.
  StatusOr<std::pair<JobState*, size_t>> Leased(const v1::LeaseToken& token);

  const CoreOptions options_;
  State state_;
  std::set<std::pair<std::string, size_t>> leases_;           // every LEASED task: (job, position)
  std::map<std::string, std::set<std::string>> worked_;       // job -> workers that ran its tasks
  uint64_t progress_version_ = 0;
  uint64_t stale_commits_ = 0;
};

}  // namespace refinery::jobs
