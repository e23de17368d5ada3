// server/jobs/core.h
//
// The coordinator's decisions: (state, command, now) -> (events, reply). Pure like the state beneath it; the caller owns
// threads, clock, log and network. Each command takes its events in at once and appends them to `events`; the caller must
// write them to the log before it lets anyone see the reply. When that fails it must stop the process, or Rebuild the state from
// what the log holds and answer with the failure.
//
//   Core core(options);
//   core.Restore(snapshot);                         // restart: the newest snapshot, if there is one,
//   for (event in the log after it) core.Replay(event);
//   core.StartGrace(now);                           // running attempts get one lease time to report themselves
//   core.CreateJob(...), core.Synchronize(...), core.Complete(...), core.Tick(now, ...), ...
//
// Errors: as the API's: INVALID_ARGUMENT, NOT_FOUND, FAILED_PRECONDITION, ALREADY_EXISTS, RESOURCE_EXHAUSTED for a quota,
// ABORTED for a stale lease.

#pragma once

#include <chrono>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "common/limits.h"
#include "common/status.h"
#include "refinery/v1/job_service.pb.h"
#include "refinery/v1/worker_service.pb.h"
#include "server/jobs/state.h"

namespace refinery::jobs {

using Events = std::vector<v1::Event>;

// Whether the call was answered before. ALREADY_EXISTS when its key stands for another one.
StatusOr<bool> WasDone(const AnsweredRequests& answered, const v1::RequestMark& mark);

struct CoreOptions {
  std::chrono::milliseconds lease_ttl = limits::kLeaseTtl;
  std::chrono::milliseconds retry_backoff{1'000};  // before the second attempt; doubled for each further one
  std::chrono::milliseconds pause_grace{60'000};   // that a pause gives running attempts to reach a checkpoint
  // An attempt that moved in its phase and then makes no progress for this long, and for ten times its slowest step, is given up;
  // one that has not moved in its phase after twelve times as long. 0 = never.
  std::chrono::milliseconds stall_timeout{300'000};
  std::string code_version;                        // part of every task's identity
  // Whether every blob of an artifact is in the store; a cached result without its bytes is of no use.
  std::function<bool(const std::string& digest)> is_complete = [](const std::string&) { return true; };

  // Bugs planted on purpose, to show that the simulation finds such. Never set outside of tests.
  struct Mutations {
    bool ignore_epoch = false;  // a stale lease is as good as the current one
    bool no_grace = false;      // leases are not renewed by a restart
    bool ignore_losses = false;  // what the store has lost is not made again
  } mutations;
};

class Core {
 public:
  explicit Core(CoreOptions options) : options_(std::move(options)) {}

  // Takes in one event of the log, at start.
  Status Replay(const v1::Event& event);
  // The durable state as bytes: snapshot + the events after state().last_seq = the whole log. Equal states give equal bytes.
  std::string Snapshot() const { return TakeSnapshot(state_); }
  // Starts from a snapshot instead of the first event; before any Replay. DATA_LOSS; the core is then as new.
  Status Restore(std::string_view snapshot);
  // Takes back events that could not be written: forgets the state, lets `replay` (Restore and Replay) make it anew, and keeps what
  // only this process knows of its tasks (timers, progress). Errors: those of `replay`; the core is then of no use.
  Status Rebuild(const std::function<Status()>& replay);
  // While `why` is an error nothing changes that is durable: commands that would make events are refused with it, and leases are
  // renewed but neither granted nor ended. Afterwards StartGrace goes on with what was left.
  void SetReadOnly(const Status& why) { read_only_ = why; }
  // While held no attempt is given up for want of progress: it may have to wait for the coordinator's disk with results that are
  // done, and nobody else could be granted its task. That time does not count against it afterwards.
  void HoldStalls(bool held, const Now& now);
  // After the replay: every lease counts as just renewed, and whatever the log left half-done goes on.
  void StartGrace(const Now& now, Events* events);

  // A change that its caller may repeat: `change`, one of the commands below, is run once for a mark (see RequestMark), whose repeat
  // finds it done, also after a restart; the mark goes into the first event of `change`, or into one of its own. What failed may be
  // tried again. ALREADY_EXISTS when the key stands for another call. An empty mark is no mark.
  Status Once(const v1::RequestMark& mark, const Now& now, Events* events, const std::function<Status()>& change);
  // Whether Once would find it done.
  StatusOr<bool> WasDone(const v1::RequestMark& mark) const { return jobs::WasDone(state_.answered, mark); }

  struct NewJob {
    std::string id;  // chosen by the caller, who has randomness
    v1::JobCreated created;
  };
  // Returns the job's id: an earlier one when the request id is known. ALREADY_EXISTS when that one had another recipe.
  StatusOr<std::string> CreateJob(const NewJob& job, const Now& now, Events* events);
  // What follows is idempotent: it is about the state that is wanted. FAILED_PRECONDITION when the job can never get there.
  // Waits for running attempts to be stopped; a job that has ended stays as it is.
  Status CancelJob(const std::string& id, const std::string& reason, const Now& now, Events* events);
  // The same at once; what still runs is cut off.
  Status KillJob(const std::string& id, const std::string& reason, const Now& now, Events* events);
  // Starts nothing new; running attempts are taken back at their next checkpoint or after options.pause_grace.
  Status PauseJob(const std::string& id, const std::string& reason, const Now& now, Events* events);
  Status ResumeJob(const std::string& id, const std::string& reason, const Now& now, Events* events);
  // A FAILED or CANCELLED job goes on where it ended; what is done stays done.
  Status RetryJob(const std::string& id, const std::string& reason, const Now& now, Events* events);
  // Priority, tenant, requirements and budget of a job that has not ended.
  Status SetPolicy(const std::string& id, const v1::JobPolicy& policy, const Now& now, Events* events);
  // Weight and quotas of a tenant.
  Status SetTenant(const v1::TenantPolicy& policy, const Now& now, Events* events);

  struct Report {
    google::protobuf::RepeatedPtrField<v1::LeaseToken> cancel;  // attempts the worker must stop and forget
    bool repeat = false;                                        // its notes were not taken in: it must send them again
    bool not_renewed = false;                                   // its leases end when they would have: it must call again
  };
  // Whether a later message of the worker was here before this one, or a later life of it: what it says is out of date, it wants
  // nothing any more, and nobody waits for its answer. Synchronize only tells an old life what to stop then.
  bool IsStale(const v1::SynchronizeRequest& request) const;
  // What a worker says of itself: renews its leases, takes progress and notes in, adopts attempts that survived a restart.
  Report Synchronize(const v1::SynchronizeRequest& request, const Now& now, Events* events);

  // READY tasks whose time has come, by priority, then oldest job first, then in the plan's order. Of tasks with the same
  // identity only one at a time: the others take its result. (The scheduler looks at the queues itself.)
  struct ReadyTask {
    std::string job;
    std::string path;
    v1::TaskKind kind = v1::TASK_KIND_UNSPECIFIED;
  };
  std::vector<ReadyTask> ReadyTasks(const Now& now, size_t limit) const;
  // Grants a READY task. NOT_FOUND when it is not READY any more (its result may have come out of the cache meanwhile).
  StatusOr<v1::Lease> Grant(const std::string& job, const std::string& path, const std::string& worker,
                            const std::string& incarnation, const Now& now, Events* events);
  // Grants READY tasks of one job together, with ranks in this order, or none of them; errors as Grant's. They meet at the address,
  // which is of the first one's worker. When one is lost, fails or is taken back, all are taken back; the others are charged nothing.
  struct Member {
    std::string path;
    std::string worker;
    std::string incarnation;
  };
  StatusOr<std::vector<v1::Lease>> GrantGang(const std::string& job, const std::vector<Member>& members, const std::string& address,
                                             uint32_t port, const Now& now, Events* events);
  // Takes a lease back at the attempt's next checkpoint: the task is READY again and nothing is charged to it.
  void Preempt(const std::string& job, const std::string& path, const std::string& reason);

  // ABORTED when the lease is not the task's current one; repeating an accepted call is OK and changes nothing.
  Status Complete(const v1::CompleteTaskRequest& request, const Now& now, Events* events);
  Status CommitCheckpoint(const v1::CommitCheckpointRequest& request, const Now& now, Events* events);

  // Expires leases whose time is over. Call at least once a second: a longer gap means that the coordinator itself stood still
  // and could not hear its workers; gaps of more than half a lease's life are therefore added to every lease.
  void Tick(const Now& now, Events* events);

  // Jobs whose tasks are all done and whose report is to be written; the caller makes it and calls WriteReport. A report that
  // a crash swallowed is asked for again.
  std::vector<std::string> JobsWithoutReport() const;
  Status WriteReport(const std::string& job, const v1::ArtifactRef& report, const Now& now, Events* events);
  // The store has found that it lacks these artifacts, or a part of them: of active jobs, what made them runs again when somebody
  // still needs it. (An attempt that fails for want of an input finds that by itself.)
  void OnLost(const std::vector<std::string>& artifacts, const Now& now, Events* events);
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
  bool AdvanceBudget(JobState& job, const Now& now, Events* events);
  bool AdvanceStudy(JobState& job, const Now& now, Events* events);
  bool AdvanceReady(JobState& job, const Now& now, Events* events);
  bool TakeFromCache(JobState& job, size_t i, const Now& now, Events* events);
  bool AdvanceEnd(JobState& job, const Now& now, Events* events);
  void FinishStudy(JobState& job, bool early, const Now& now, Events* events);
  void EmitJobFinished(const JobState& job, v1::JobFinished::Outcome outcome, const std::string& reason, const Now& now,
                       Events* events);
  void EmitFailed(const JobState& job, size_t i, const v1::TaskError& error, bool retry, const Now& now, Events* events);
  void EmitExpired(const JobState& job, size_t i, v1::LeaseExpired::Cause cause, const std::string& reason, const Now& now,
                   Events* events);
  void EmitReleased(const JobState& job, size_t i, const Now& now, Events* events);
  void TakeNotes(JobState& job, const std::string& path, const google::protobuf::RepeatedPtrField<v1::Note>& notes,
                 const Now& now, Events* events);
  Status CompleteWithError(JobState& job, size_t i, v1::TaskError error, const Now& now, Events* events);
  // The task that `token` leases now; ABORTED otherwise.
  StatusOr<std::pair<JobState*, size_t>> Leased(const v1::LeaseToken& token);

  // losses.cc
  void EmitLost(const JobState& job, size_t i, bool checkpoint, const Now& now, Events* events);
  // A done task runs again, because its output is gone.
  void Reopen(JobState& job, size_t i, const Now& now, Events* events);
  static int MakerOf(const JobState& job, size_t i, size_t k);
  // Sees to it that input `k` of task `i`, which was `digest` and is gone, is made again; false when it cannot be.
  bool ComesAgain(JobState& job, size_t i, size_t k, const std::string& digest, const Now& now, Events* events);
  // Whether the attempt failed because inputs of task `i` are gone, and will come again: it is over then, and nothing is charged to
  // the task. An input that cannot be made again is named in `error`.
  bool TakeLosses(JobState& job, size_t i, v1::TaskError* error, const Now& now, Events* events);

  // leases.cc
  // Its lease runs from now on, less `short_by`.
  void Hold(TaskState& task, std::chrono::milliseconds short_by, const Now& now);
  // What a call does for the leases of a worker that may not have heard answers for long.
  struct Renewal {
    bool renewed = true;
    std::chrono::milliseconds short_by{0};
  };
  Renewal RenewalOf(const v1::SynchronizeRequest& request) const;
  // The position of a task that can be leased now.
  StatusOr<size_t> Grantable(const std::string& job, const std::string& path, const Now& now, Events* events);
  v1::Lease EmitLeased(JobState& job, size_t i, const Member& member, const v1::Gang& gang, const Now& now, Events* events);
  // Takes back what is left of the gang whose member `lost` is not leased any more.
  void ReleaseGang(const std::string& job, const v1::Gang& gang, const std::string& lost, const Now& now, Events* events);
  // Takes note of the incarnation and of how far its messages have come.
  void NoteLife(const v1::SynchronizeRequest& request);
  void TakeProgress(TaskState& task, const v1::TaskProgress& progress, const Now& now);
  void CheckMissing(const v1::SynchronizeRequest& request, const std::set<LeaseKey>& alive, const Now& now, Events* events);
  void ExtendLeases(std::chrono::milliseconds gap, const Now& now);
  // When the attempt is given up for want of progress.
  std::chrono::milliseconds StallDeadline(const TaskState& task) const;
  void CheckWallBudgets(const Now& now, Events* events);

  const CoreOptions options_;
  State state_;
  Status read_only_;
  v1::RequestMark mark_;                                     // for the next event; empty outside of Once
  struct Life {
    std::string incarnation;
    uint64_t revision = 0;         // of its newest message
    std::vector<std::string> old;
  };
  std::unordered_map<std::string, Life> lives_;              // by worker
  std::chrono::milliseconds next_scan_{0};                   // no lease needs a look before
  std::chrono::milliseconds last_tick_{-1};
  std::chrono::milliseconds stalls_held_since_{-1};          // negative: they are not
  std::chrono::milliseconds budgets_checked_{0};
  uint64_t progress_version_ = 0;
  uint64_t stale_commits_ = 0;
  std::chrono::milliseconds lives_known_from_{0};            // before, an unknown incarnation may be an old one
};

}  // namespace refinery::jobs
