#include "server/jobs/core.h"

#include <algorithm>
#include <cmath>

#include "server/jobs/retry.h"

namespace refinery::jobs {
namespace {

std::string Cut(const std::string& text) { return text.substr(0, limits::kMaxErrorBytes); }

// Compares what was submitted, not how: the order of map entries says nothing.
bool SameRequest(const v1::JobCreated& a, const v1::JobCreated& b) {
  return a.recipe().SerializeAsString() == b.recipe().SerializeAsString() &&
         std::map<std::string, std::string>(a.files().begin(), a.files().end()) ==
             std::map<std::string, std::string>(b.files().begin(), b.files().end());
}

v1::TaskError MakeError(v1::FailureClass failure_class, absl::StatusCode code, const std::string& message) {
  v1::TaskError error;
  error.set_failure_class(failure_class);
  error.set_code(static_cast<int>(code));
  error.set_message(Cut(message));
  return error;
}

}  // namespace

Status Core::Replay(const v1::Event& event) {
  RF_RETURN_IF_ERROR(Apply(state_, event, options_.code_version));
  if (event.has_task_leased()) worked_[event.job()].insert(event.task_leased().worker());
  return absl::OkStatus();
}

void Core::StartGrace(const Now& now, Events* events) {
  for (const std::string& id : state_.order) {
    JobState& job = Job(id);
    for (const size_t i : job.leased) {
      job.tasks[i].lease_deadline = now.steady + options_.lease_ttl;
      leases_.insert({id, i});
    }
    Advance(id, now, events);
  }
}

void Core::Emit(const std::string& job, v1::Event event, const Now& now, Events* events) {
  event.set_seq(state_.last_seq + 1);
  event.set_job(job);
  event.set_time_ms(now.unix_ms);
  const Status status = Apply(state_, event, options_.code_version);
  RF_CHECK(status.ok() && "a command made an event that does not fit the state");
  events->push_back(std::move(event));
}

StatusOr<std::string> Core::CreateJob(const NewJob& new_job, const Now& now, Events* events) {
  const v1::JobCreated& created = new_job.created;
  const auto known = state_.requests.find(created.request_id());
  if (!created.request_id().empty() && known != state_.requests.end()) {
    if (SameRequest(Job(known->second).created, created)) return known->second;
    return AlreadyExists("request ", created.request_id(), " was already used for job ", known->second,
                         " with another recipe; use a new request id");
  }
  if (state_.jobs.contains(new_job.id)) return AlreadyExists("there is a job ", new_job.id, " already");
  RF_ASSIGN_OR_RETURN(plan::Plan plan,
                      plan::MakePlan(created.recipe(), {created.files().begin(), created.files().end()}));
  if (plan.tasks.size() > limits::kMaxTasksPerJob) {
    return InvalidArgument("the recipe makes ", plan.tasks.size(), " tasks; at most ", limits::kMaxTasksPerJob,
                           " are possible: lower search.trials, search.replicates or the shards");
  }
  v1::Event event;
  *event.mutable_job_created() = created;
  Emit(new_job.id, std::move(event), now, events);
  Advance(new_job.id, now, events);
  return new_job.id;
}

Status Core::CancelJob(const std::string& id, const std::string& reason, const Now& now, Events* events) {
  RF_ASSIGN_OR_RETURN(const JobState* job, FindJob(id));
  if (IsTerminal(job->state) || job->state == v1::Job::CANCELLING) return absl::OkStatus();
  const std::string full_id = job->id;
  v1::Event event;
  event.mutable_job_cancel_requested()->set_reason(Cut(reason.empty() ? "cancelled by the user" : reason));
  Emit(full_id, std::move(event), now, events);
  Advance(full_id, now, events);
  return absl::OkStatus();
}

const TaskState* Core::AttemptOf(const v1::LeaseToken& token) const {
  const auto job = state_.jobs.find(token.job());
  if (job == state_.jobs.end()) return nullptr;
  const TaskState* task = job->second.Find(token.path());
  return task != nullptr && task->epoch == token.epoch() && token.epoch() > 0 ? task : nullptr;
}

StatusOr<std::pair<JobState*, size_t>> Core::Leased(const v1::LeaseToken& token) {
  const TaskState* task = AttemptOf(token);
  if (task == nullptr || task->state != v1::Task::LEASED) {
    ++stale_commits_;
    return Aborted("STALE_LEASE: epoch ", token.epoch(), " of ", token.job(), "/", token.path(),
                   " is not its current lease; stop this attempt and forget it");
  }
  JobState& job = Job(token.job());
  return std::make_pair(&job, job.index.at(token.path()));
}

Core::Report Core::Synchronize(const v1::SynchronizeRequest& request, const Now& now, Events* events) {
  Report report;
  const std::string& worker = request.worker().id();
  std::set<std::pair<std::string, size_t>> alive;
  for (const v1::RunningAttempt& running : request.running()) {
    const TaskState* found = AttemptOf(running.lease());
    if (found == nullptr || found->state != v1::Task::LEASED) {
      *report.cancel.Add() = running.lease();
      continue;
    }
    JobState& job = Job(running.lease().job());
    const size_t i = job.index.at(running.lease().path());
    TaskState& task = job.tasks[i];
    alive.insert({job.id, i});
    TakeNotes(job, running.lease().path(), running.notes(), now, events);
    if (job.state == v1::Job::CANCELLING) {  // not renewed: an attempt that will not stop runs into its deadline
      *report.cancel.Add() = running.lease();
      continue;
    }
    task.lease_deadline = now.steady + options_.lease_ttl;
    if (running.has_progress()) {
      task.progress = running.progress();
      task.progress_version = ++progress_version_;
    }
  }
  // Leases that this worker holds but does not run. A restarted worker has lost them. The same incarnation may be about to
  // complete them, so those only run into their deadline, unless nobody wants them any more.
  const std::set<std::pair<std::string, size_t>> leases = leases_;
  for (const auto& [id, i] : leases) {
    JobState& job = Job(id);
    const TaskState& task = job.tasks[i];
    if (task.worker != worker || alive.contains({id, i}) || task.state != v1::Task::LEASED) continue;
    if (task.incarnation != request.incarnation()) {
      EmitExpired(job, i, Join("worker ", worker, " was restarted"), now, events);
    } else if (job.state == v1::Job::CANCELLING) {
      EmitExpired(job, i, "stopped, because the job is being cancelled", now, events);
    }
  }
  return report;
}

void Core::TakeNotes(JobState& job, const std::string& path, const google::protobuf::RepeatedPtrField<v1::Note>& notes,
                     const Now& now, Events* events) {
  for (const v1::Note& note : notes) {
    const bool known = std::any_of(job.notes.begin(), job.notes.end(), [&](const v1::Event& event) {
      return event.task_note().path() == path && event.task_note().note().code() == note.code() &&
             event.task_note().note().text() == Cut(note.text());
    });
    if (known || IsTerminal(job.state)) continue;  // a repeated report, or one that comes too late for anyone to read
    v1::Event event;
    event.mutable_task_note()->set_path(path);
    event.mutable_task_note()->mutable_note()->set_code(note.code().substr(0, 100));
    event.mutable_task_note()->mutable_note()->set_text(Cut(note.text()));
    Emit(job.id, std::move(event), now, events);
  }
}

std::vector<Core::ReadyTask> Core::ReadyTasks(const Now& now, size_t limit) const {
  std::vector<ReadyTask> ready;
  std::set<std::string> coming;  // identities whose result is being made: an identical task waits for it
  for (const auto& [id, i] : leases_) {
    const TaskState& task = state_.jobs.at(id).tasks[i];
    if (task.state == v1::Task::LEASED) coming.insert(task.digest);
  }
  for (const std::string& id : state_.order) {
    const JobState& job = state_.jobs.at(id);
    for (const size_t i : job.ready) {
      if (ready.size() == limit) return ready;
      const TaskState& task = job.tasks[i];
      if (task.not_before > now.steady) continue;
      if (!task.digest.empty() && !coming.insert(task.digest).second) continue;
      const auto worked = worked_.find(id);
      ready.push_back({.job = id,
                       .path = job.plan.tasks[i].path,
                       .kind = job.plan.tasks[i].kind,
                       .avoid = task.avoid,
                       .worked = worked == worked_.end() ? std::set<std::string>() : worked->second});
    }
  }
  return ready;
}

StatusOr<v1::Lease> Core::Grant(const std::string& job_id, const std::string& path, const std::string& worker,
                                const std::string& incarnation, const Now& now, Events* events) {
  const auto found = state_.jobs.find(job_id);
  if (found == state_.jobs.end()) return NotFound("there is no job ", job_id);
  JobState& job = found->second;
  const auto position = job.index.find(path);
  if (position == job.index.end()) return NotFound("job ", job_id, " has no task ", path);
  const size_t i = position->second;
  TaskState& task = job.tasks[i];
  if (task.state == v1::Task::READY && TakeFromCache(job, i, now, events)) Advance(job_id, now, events);
  if (task.state != v1::Task::READY) return NotFound(path, " of job ", job_id, " is not ready");

  v1::Event event;
  v1::TaskLeased* leased = event.mutable_task_leased();
  leased->set_path(path);
  leased->set_epoch(task.epoch + 1);
  leased->set_attempt(task.attempt + 1);
  leased->set_worker(worker);
  leased->set_incarnation(incarnation);
  *leased->mutable_spec() = task.spec;
  Emit(job_id, std::move(event), now, events);
  task.lease_deadline = now.steady + options_.lease_ttl;
  leases_.insert({job_id, i});
  worked_[job_id].insert(worker);

  v1::Lease lease;
  lease.mutable_token()->set_job(job_id);
  lease.mutable_token()->set_path(path);
  lease.mutable_token()->set_epoch(task.epoch);
  *lease.mutable_spec() = task.spec;
  lease.set_attempt(task.attempt);
  if (!task.checkpoint.digest().empty()) {
    *lease.mutable_checkpoint() = task.checkpoint;
    lease.set_checkpoint_step(task.checkpoint_step);
  }
  return lease;
}

Status Core::Complete(const v1::CompleteTaskRequest& request, const Now& now, Events* events) {
  if (request.outcome_case() == v1::CompleteTaskRequest::OUTCOME_NOT_SET) {
    return InvalidArgument("outcome is missing; set success or error");
  }
  const TaskState* attempt = AttemptOf(request.lease());
  if (attempt != nullptr && attempt->reported_epoch == request.lease().epoch() &&
      (request.has_error() || attempt->output.digest() == request.success().output().digest())) {
    return absl::OkStatus();  // said before; the answer was lost
  }
  RF_ASSIGN_OR_RETURN(const auto leased, Leased(request.lease()));
  JobState& job = *leased.first;
  const size_t i = leased.second;
  TakeNotes(job, request.lease().path(), request.notes(), now, events);
  if (request.has_error()) return CompleteWithError(job, i, request.error(), now, events);

  const v1::CompleteTaskRequest::Success& success = request.success();
  if (job.plan.tasks[i].kind == v1::TRAIN) {
    const auto loss = std::find_if(success.measurements().begin(), success.measurements().end(),
                                   [](const v1::Measurement& m) { return m.name() == "validation_loss"; });
    if (loss == success.measurements().end()) {
      return CompleteWithError(job, i, MakeError(v1::BUG, absl::StatusCode::kInternal,
                                                 "the training reported no validation_loss, which the search needs"),
                               now, events);
    }
    if (!std::isfinite(loss->value())) {
      return CompleteWithError(job, i, MakeError(v1::NUMERIC, absl::StatusCode::kOutOfRange,
                                                 "the validation loss is not finite"), now, events);
    }
  }
  v1::Event event;
  v1::TaskFinished* finished = event.mutable_task_finished();
  finished->set_path(request.lease().path());
  finished->set_epoch(request.lease().epoch());
  *finished->mutable_output() = success.output();
  *finished->mutable_measurements() = success.measurements();
  finished->set_task_digest(job.tasks[i].digest);
  finished->set_seconds(success.seconds());
  finished->set_peak_memory_bytes(success.peak_memory_bytes());
  Emit(job.id, std::move(event), now, events);
  leases_.erase({job.id, i});
  Advance(job.id, now, events);
  return absl::OkStatus();
}

Status Core::CompleteWithError(JobState& job, size_t i, v1::TaskError error, const Now& now, Events* events) {
  error.set_failure_class(ClassOf(error));
  error.set_message(Cut(error.message()));
  TaskState& task = job.tasks[i];
  EmitFailed(job, i, error, MayRetry(task, error.failure_class()), now, events);
  leases_.erase({job.id, i});
  const uint32_t failures = std::max({task.infra_failures, task.node_failures, task.resource_failures, task.crashes, 1u});
  task.not_before = now.steady + Backoff(failures, options_.retry_backoff);
  Advance(job.id, now, events);
  return absl::OkStatus();
}

Status Core::CommitCheckpoint(const v1::CommitCheckpointRequest& request, const Now& now, Events* events) {
  RF_ASSIGN_OR_RETURN(const auto leased, Leased(request.lease()));
  JobState& job = *leased.first;
  const TaskState& task = job.tasks[leased.second];
  if (request.step() == task.checkpoint_step && request.checkpoint().digest() == task.checkpoint.digest()) {
    return absl::OkStatus();  // said before
  }
  if (request.step() <= task.checkpoint_step) {
    return FailedPrecondition("checkpoint step ", request.step(), " of ", request.lease().path(), " is not after step ",
                              task.checkpoint_step, ", which was committed already");
  }
  v1::Event event;
  v1::CheckpointCommitted* committed = event.mutable_checkpoint_committed();
  committed->set_path(request.lease().path());
  committed->set_epoch(request.lease().epoch());
  committed->set_step(request.step());
  *committed->mutable_checkpoint() = request.checkpoint();
  Emit(job.id, std::move(event), now, events);
  return absl::OkStatus();
}

void Core::Tick(const Now& now, Events* events) {
  std::vector<std::pair<std::string, size_t>> over;
  for (const auto& [id, i] : leases_) {
    if (Job(id).tasks[i].lease_deadline <= now.steady) over.push_back({id, i});
  }
  for (const auto& [id, i] : over) {
    JobState& job = Job(id);
    if (job.tasks[i].state != v1::Task::LEASED) {  // the job ended meanwhile
      leases_.erase({id, i});
      continue;
    }
    EmitExpired(job, i, Join("no word from worker ", job.tasks[i].worker, " for ", options_.lease_ttl.count(), " ms"), now,
                events);
  }
}

void Core::EmitExpired(const JobState& job, size_t i, const std::string& reason, const Now& now, Events* events) {
  const std::string id = job.id;
  const TaskState& task = job.tasks[i];
  v1::Event event;
  v1::LeaseExpired* expired = event.mutable_lease_expired();
  expired->set_path(job.plan.tasks[i].path);
  expired->set_epoch(task.epoch);
  expired->set_worker(task.worker);
  expired->set_reason(reason);
  Emit(id, std::move(event), now, events);
  leases_.erase({id, i});
  if (task.state == v1::Task::READY && task.crashes >= kMaxCrashes) {
    EmitFailed(job, i, MakeError(v1::POISON, absl::StatusCode::kAborted,
                                 Join(task.crashes, " attempts ended without a word; the last: ", reason,
                                      ". It may be the task that kills its workers: see its log")),
               false, now, events);
  }
  Advance(id, now, events);
}

void Core::EmitFailed(const JobState& job, size_t i, const v1::TaskError& error, bool retry, const Now& now,
                      Events* events) {
  v1::Event event;
  v1::TaskFailed* failed = event.mutable_task_failed();
  failed->set_path(job.plan.tasks[i].path);
  failed->set_epoch(job.tasks[i].epoch);
  *failed->mutable_error() = error;
  failed->set_retry(retry);
  Emit(job.id, std::move(event), now, events);
}

StatusOr<const JobState*> Core::FindJob(const std::string& id) const {
  if (id.empty()) return InvalidArgument("id is missing; name a job");
  const auto exact = state_.jobs.find(id);
  if (exact != state_.jobs.end()) return &exact->second;
  std::vector<const JobState*> matches;
  for (auto it = state_.jobs.lower_bound(id); it != state_.jobs.end() && it->first.starts_with(id); ++it) {
    matches.push_back(&it->second);
  }
  if (matches.size() == 1) return matches.front();
  if (matches.empty()) return NotFound("there is no job ", id, "; `refinery list` shows the jobs");
  std::string names;
  for (size_t i = 0; i < std::min<size_t>(matches.size(), 5); ++i) names += Join(i ? ", " : "", matches[i]->id);
  return InvalidArgument("'", id, "' begins the names of ", matches.size(), " jobs (", names, "); write more of it");
}

}  // namespace refinery::jobs
