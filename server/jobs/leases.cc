// The part of the core that is about leases: who holds them, for how long, and how they end without the worker's word.

#include <algorithm>
#include <limits>

#include "common/limits.h"
#include "server/jobs/core.h"
#include "server/jobs/retry.h"
#include "server/jobs/text.h"

namespace refinery::jobs {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kNever = milliseconds::max();
constexpr size_t kOldLives = 8;         // incarnations of a worker that are remembered
constexpr int kSlowerThanSlowest = 10;  // times, before an attempt counts as stalled
constexpr int kFirstStep = 12;          // times options.stall_timeout, for a phase that has not moved yet
constexpr size_t kMaxLives = 20'000;    // workers whose incarnations are remembered
constexpr milliseconds kBudgetCheck{1'000};

bool HasMoved(const v1::TaskProgress& a, const v1::TaskProgress& b) {
  return a.phase() != b.phase() || a.done() != b.done() || a.tokens_trained() != b.tokens_trained() ||
         a.tokens_generated() != b.tokens_generated();
}

}  // namespace

void Core::Hold(TaskState& task, milliseconds short_by, const Now& now) {
  task.lease_deadline = now.steady + options_.lease_ttl - std::min(short_by, options_.lease_ttl);
  task.missing_since = milliseconds(-1);
  next_scan_ = std::min(next_scan_, task.lease_deadline);
}

// A worker counts its leases from the last call that was answered. When it has not heard answers for long, they may be what is
// lost: a lease that its messages kept alive would outlive the worker's own belief in it by as long as they arrive. So a lease ends
// at most `usual` behind what the last answer gave, and when the worker's fence could come later than that, the call renews nothing:
// the worker has to say first, by calling again, that an answer reached it.
Core::Renewal Core::RenewalOf(const v1::SynchronizeRequest& request) const {
  const milliseconds ttl = options_.lease_ttl, unheard(request.unheard_ms());
  const milliseconds usual = std::max(ttl * 2 / 15, 2 * limits::SynchronizeInterval(ttl));
  if (unheard <= usual) return {};
  if (unheard <= usual + limits::FenceMargin(ttl) / 2) return {.short_by = unheard - usual};
  return {.renewed = false, .short_by = unheard};
}

bool Core::IsStale(const v1::SynchronizeRequest& request) const {
  const auto found = lives_.find(request.worker().id());
  if (found == lives_.end()) return false;
  const Life& life = found->second;
  if (life.incarnation != request.incarnation()) {
    return std::find(life.old.begin(), life.old.end(), request.incarnation()) != life.old.end();
  }
  return request.revision() != 0 && request.revision() <= life.revision;  // 0: an agent that does not number them
}

void Core::NoteLife(const v1::SynchronizeRequest& request) {
  if (lives_.size() > kMaxLives) lives_.clear();  // then late messages of earlier lives may cost a lease, nothing worse
  Life& life = lives_[request.worker().id()];
  if (life.incarnation != request.incarnation()) {
    if (!life.incarnation.empty()) life.old.push_back(life.incarnation);
    if (life.old.size() > kOldLives) life.old.erase(life.old.begin());
    life.incarnation = request.incarnation();
    life.revision = 0;
  }
  life.revision = std::max(life.revision, request.revision());
}

Core::Report Core::Synchronize(const v1::SynchronizeRequest& request, const Now& now, Events* events) {
  Report report;
  const std::string& worker = request.worker().id();
  if (IsStale(request)) {  // a message that was long on its way
    // What this life says of its leases is out of date: one may have been granted since, whose answer is on its way, or have been begun.
    if (lives_.at(worker).incarnation == request.incarnation()) {
      report.not_renewed = true;
      return report;
    }
    for (const v1::RunningAttempt& running : request.running()) *report.cancel.Add() = running.lease();
    return report;
  }
  NoteLife(request);
  const Renewal renewal = RenewalOf(request);
  report.not_renewed = !renewal.renewed && request.running_size() > 0;
  std::set<LeaseKey> alive;
  for (const v1::RunningAttempt& running : request.running()) {
    const TaskState* found = AttemptOf(running.lease());
    if (found == nullptr || found->state != v1::Task::LEASED || found->worker != worker ||
        found->incarnation != request.incarnation()) {
      *report.cancel.Add() = running.lease();
      continue;
    }
    JobState& job = Job(running.lease().job());
    const size_t i = job.index.at(running.lease().path());
    TaskState& task = job.tasks[i];
    alive.insert({job.id, i});
    report.repeat |= !read_only_.ok() && !running.notes().empty();
    if (read_only_.ok()) TakeNotes(job, running.lease().path(), running.notes(), now, events);
    if (job.state == v1::Job::CANCELLING) {  // not renewed: an attempt that will not stop runs into its deadline
      *report.cancel.Add() = running.lease();
      continue;
    }
    Hold(task, renewal.short_by, now);
    if (running.has_progress()) TakeProgress(task, running.progress(), now);
  }
  if (read_only_.ok()) CheckMissing(request, alive, now, events);
  return report;
}

void Core::TakeProgress(TaskState& task, const v1::TaskProgress& progress, const Now& now) {
  if (HasMoved(task.progress, progress)) {
    // What one phase needs for a step says nothing of the next: an upload may show nothing for long.
    const bool same_phase = task.progress.phase() == progress.phase();
    task.slowest_step = same_phase ? std::max({task.slowest_step, now.steady - task.moved, milliseconds(1)}) : milliseconds(0);
    task.moved = now.steady;
  }
  task.progress = progress;
  task.progress_version = ++progress_version_;
}

// Leases that this worker holds but does not run. A restarted worker has lost them. The same incarnation may be about to complete
// them, so those get some time, unless nobody wants them any more; and soon after a restart its message may be one that was overtaken.
void Core::CheckMissing(const v1::SynchronizeRequest& request, const std::set<LeaseKey>& alive, const Now& now, Events* events) {
  const std::string& worker = request.worker().id();
  const auto held = state_.worker_leases.find(worker);
  if (held == state_.worker_leases.end()) return;
  const std::set<LeaseKey> leases = held->second;
  for (const LeaseKey& key : leases) {
    JobState& job = Job(key.first);
    TaskState& task = job.tasks[key.second];
    if (alive.contains(key) || task.state != v1::Task::LEASED) continue;
    if (task.incarnation != request.incarnation()) {
      if (now.steady < lives_known_from_) continue;  // it may be a message of an earlier life: the lease runs out by itself
      EmitExpired(job, key.second, v1::LeaseExpired::RESTARTED, Join("worker ", worker, " was restarted"), now, events);
    } else if (job.state == v1::Job::CANCELLING) {
      EmitExpired(job, key.second, v1::LeaseExpired::DROPPED, "stopped, because the job is being cancelled", now, events);
    } else if (task.missing_since.count() < 0) {
      task.missing_since = now.steady;
    } else if (now.steady >= lives_known_from_ && now.steady - task.missing_since >= options_.lease_ttl / 3) {
      EmitExpired(job, key.second, v1::LeaseExpired::DROPPED, Join("worker ", worker, " does not run it any more"), now, events);
    }
  }
}

StatusOr<size_t> Core::Grantable(const std::string& job_id, const std::string& path, const Now& now, Events* events) {
  const auto found = state_.jobs.find(job_id);
  if (found == state_.jobs.end()) return NotFound("there is no job ", job_id);
  JobState& job = found->second;
  const auto position = job.index.find(path);
  if (position == job.index.end()) return NotFound("job ", job_id, " has no task ", path);
  const size_t i = position->second;
  if (job.state == v1::Job::PAUSED) return FailedPrecondition("job ", job_id, " is paused");
  RF_RETURN_IF_ERROR(read_only_);
  if (job.IsReady(i) && TakeFromCache(job, i, now, events)) Advance(job_id, now, events);
  if (!job.IsReady(i)) return NotFound(path, " of job ", job_id, " is not ready");
  return i;
}

StatusOr<v1::Lease> Core::Grant(const std::string& job, const std::string& path, const std::string& worker,
                                const std::string& incarnation, const Now& now, Events* events) {
  RF_ASSIGN_OR_RETURN(const size_t i, Grantable(job, path, now, events));
  return EmitLeased(Job(job), i, {path, worker, incarnation}, v1::Gang(), now, events);
}

v1::Lease Core::EmitLeased(JobState& job, size_t i, const Member& member, const v1::Gang& gang, const Now& now, Events* events) {
  TaskState& task = job.tasks[i];
  v1::Event event;
  v1::TaskLeased* leased = event.mutable_task_leased();
  leased->set_path(member.path);
  leased->set_epoch(task.epoch + 1);
  leased->set_attempt(task.attempt + 1);
  leased->set_worker(member.worker);
  leased->set_incarnation(member.incarnation);
  *leased->mutable_spec() = task.spec;
  if (!gang.id().empty()) *leased->mutable_gang() = gang;
  Emit(job.id, std::move(event), now, events);
  task.lease_deadline = now.steady + options_.lease_ttl;
  task.moved = now.steady;
  next_scan_ = std::min(next_scan_, task.lease_deadline);

  v1::Lease lease;
  lease.mutable_token()->set_job(job.id);
  lease.mutable_token()->set_path(member.path);
  lease.mutable_token()->set_epoch(task.epoch);
  *lease.mutable_spec() = task.spec;
  lease.set_attempt(task.attempt);
  if (!gang.id().empty()) *lease.mutable_gang() = gang;
  if (!task.checkpoint.digest().empty()) {
    *lease.mutable_checkpoint() = task.checkpoint;
    lease.set_checkpoint_step(task.checkpoint_step);
  }
  return lease;
}

void Core::Preempt(const std::string& job_id, const std::string& path, const std::string& reason) {
  const auto found = state_.jobs.find(job_id);
  TaskState* task = found == state_.jobs.end() ? nullptr : found->second.Find(path);
  if (task == nullptr || task->state != v1::Task::LEASED || task->release_at.count() >= 0) return;
  task->release_at = kNever;
  task->release_reason = reason;
}

milliseconds Core::StallDeadline(const TaskState& task) const {
  if (options_.stall_timeout.count() == 0 || stalls_held_since_.count() >= 0) return kNever;
  if (task.slowest_step.count() == 0) return task.moved + kFirstStep * options_.stall_timeout;
  return task.moved + std::max(options_.stall_timeout, kSlowerThanSlowest * task.slowest_step);
}

void Core::HoldStalls(bool held, const Now& now) {
  if (held == (stalls_held_since_.count() >= 0)) return;
  if (!held) {
    const milliseconds gap = now.steady - stalls_held_since_;
    for (const auto& [id, i] : state_.leases) {
      TaskState& task = Job(id).tasks[i];
      task.moved = std::min(task.moved + gap, now.steady);
    }
  }
  stalls_held_since_ = held ? now.steady : milliseconds(-1);
  next_scan_ = now.steady;
}

void Core::ExtendLeases(milliseconds gap, const Now& now) {
  for (const auto& [id, i] : state_.leases) {
    TaskState& task = Job(id).tasks[i];
    const milliseconds most = now.steady + options_.lease_ttl;
    task.lease_deadline = std::max(task.lease_deadline, std::min(task.lease_deadline + gap, most));
    task.moved = std::min(task.moved + gap, now.steady);
  }
}

void Core::Tick(const Now& now, Events* events) {
  const milliseconds gap = last_tick_.count() < 0 ? milliseconds(0) : now.steady - last_tick_;
  last_tick_ = now.steady;
  if (gap > options_.lease_ttl / 2) ExtendLeases(gap, now);
  if (!read_only_.ok()) return;
  CheckWallBudgets(now, events);
  if (now.steady < next_scan_) return;
  next_scan_ = kNever;
  const std::set<LeaseKey> leases = state_.leases;
  for (const auto& [id, i] : leases) {
    JobState& job = Job(id);
    const TaskState& task = job.tasks[i];
    if (task.state != v1::Task::LEASED) continue;  // the job ended meanwhile
    const milliseconds stalled = StallDeadline(task);
    if (task.lease_deadline <= now.steady) {
      const bool lives = task.missing_since.count() >= 0;
      EmitExpired(job, i, lives ? v1::LeaseExpired::DROPPED : v1::LeaseExpired::SILENT,
                  Join("no word from worker ", task.worker, lives ? " about it" : "", " for ", options_.lease_ttl.count(), " ms"),
                  now, events);
    } else if (task.release_at.count() >= 0 && task.release_at <= now.steady) {
      EmitReleased(job, i, now, events);
    } else if (stalled <= now.steady) {
      EmitExpired(job, i, v1::LeaseExpired::STALLED,
                  Join("stalled: no progress in '", task.progress.phase(), "' for ", (now.steady - task.moved).count(), " ms"), now,
                  events);
    } else {
      next_scan_ = std::min({next_scan_, task.lease_deadline, stalled, task.release_at.count() < 0 ? kNever : task.release_at});
    }
  }
}

void Core::EmitExpired(const JobState& job, size_t i, v1::LeaseExpired::Cause cause, const std::string& reason, const Now& now,
                       Events* events) {
  const std::string id = job.id;
  const TaskState& task = job.tasks[i];
  v1::Event event;
  v1::LeaseExpired* expired = event.mutable_lease_expired();
  expired->set_path(job.plan.tasks[i].path);
  expired->set_epoch(task.epoch);
  expired->set_worker(task.worker);
  expired->set_reason(Cut(reason));
  expired->set_cause(cause);
  Emit(id, std::move(event), now, events);
  ReleaseGang(id, task.gang, job.plan.tasks[i].path, now, events);
  const bool ready = task.state == v1::Task::READY;
  if (ready && cause != v1::LeaseExpired::DROPPED && task.crashes >= kMaxCrashes) {
    EmitFailed(job, i, MakeError(v1::POISON, absl::StatusCode::kAborted,
                                 Join(task.crashes, " attempts ended without a word; the last: ", reason,
                                      ". It may be the task that kills its workers: see its log")),
               false, now, events);
  } else if (ready && cause == v1::LeaseExpired::DROPPED && task.infra_failures > kMaxInfraFailures) {
    EmitFailed(job, i, MakeError(v1::INFRA, absl::StatusCode::kAborted,
                                 Join(task.infra_failures, " attempts were lost; the last: ", reason)),
               false, now, events);
  }
  Advance(id, now, events);
}

void Core::EmitReleased(const JobState& job, size_t i, const Now& now, Events* events) {
  const std::string id = job.id;
  const TaskState& task = job.tasks[i];
  v1::Event event;
  v1::LeaseReleased* released = event.mutable_lease_released();
  released->set_path(job.plan.tasks[i].path);
  released->set_epoch(task.epoch);
  released->set_worker(task.worker);
  released->set_reason(Cut(task.release_reason.empty() ? "the job is paused" : task.release_reason));
  Emit(id, std::move(event), now, events);
  ReleaseGang(id, task.gang, job.plan.tasks[i].path, now, events);
  Advance(id, now, events);
}

void Core::CheckWallBudgets(const Now& now, Events* events) {
  if (now.steady - budgets_checked_ < kBudgetCheck) return;
  budgets_checked_ = now.steady;
  const std::set<JobKey> active = state_.active;
  for (const auto& [seq, id] : active) {
    const JobState& job = Job(id);
    if (job.created.policy().budget().wall_ms() > 0 && job.exhausted.empty()) Advance(id, now, events);
  }
}

}  // namespace refinery::jobs
