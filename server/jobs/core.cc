#include "server/jobs/core.h"

#include <algorithm>
#include <cmath>

#include "server/jobs/policy.h"
#include "server/jobs/retry.h"
#include "server/jobs/stored_plan.h"
#include "server/jobs/text.h"

namespace refinery::jobs {
namespace {

// Compares what was submitted, not how: the order of map entries says nothing.
bool SameRequest(const v1::JobCreated& a, const v1::JobCreated& b) {
  return a.recipe().SerializeAsString() == b.recipe().SerializeAsString() &&
         std::map<std::string, std::string>(a.files().begin(), a.files().end()) ==
             std::map<std::string, std::string>(b.files().begin(), b.files().end());
}

}  // namespace

Status Core::Replay(const v1::Event& event) {
  return Apply(state_, event, options_.code_version);
}

Status Core::Restore(std::string_view snapshot) {
  RF_CHECK(state_.last_seq == 0);
  RF_ASSIGN_OR_RETURN(state_, ReadSnapshot(snapshot, options_.code_version));
  return absl::OkStatus();
}

void Core::StartGrace(const Now& now, Events* events) {
  last_tick_ = now.steady;
  lives_known_from_ = now.steady + 2 * options_.lease_ttl;  // no call is on its way for longer
  for (const auto& [id, i] : state_.leases) {
    JobState& job = Job(id);
    if (!options_.mutations.no_grace) Hold(job.tasks[i], std::chrono::milliseconds(0), now);
    job.tasks[i].moved = now.steady;
    if (job.state == v1::Job::PAUSED) job.tasks[i].release_at = now.steady + options_.pause_grace;
  }
  next_scan_ = now.steady;
  const std::set<JobKey> active = state_.active;
  for (const auto& [seq, id] : active) Advance(id, now, events);
}

void Core::Emit(const std::string& job, v1::Event event, const Now& now, Events* events) {
  RF_CHECK(read_only_.ok());
  event.set_seq(state_.last_seq + 1);
  event.set_job(job);
  event.set_time_ms(now.unix_ms);
  if (!mark_.key().empty()) event.mutable_request()->Swap(&mark_);
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
  RF_RETURN_IF_ERROR(read_only_);
  if (state_.jobs.contains(new_job.id)) return AlreadyExists("there is a job ", new_job.id, " already");
  RF_ASSIGN_OR_RETURN(plan::Plan plan,
                      plan::MakePlan(created.recipe(), {created.files().begin(), created.files().end()}));
  if (plan.tasks.size() > limits::kMaxTasksPerJob) {
    return InvalidArgument("the recipe makes ", plan.tasks.size(), " tasks; at most ", limits::kMaxTasksPerJob,
                           " are possible: lower search.trials, search.replicates or the shards");
  }
  RF_RETURN_IF_ERROR(CheckPolicy(created.policy()));
  RF_RETURN_IF_ERROR(CheckJobQuota(state_, created.policy()));
  v1::Event event;
  *event.mutable_job_created() = created;
  event.mutable_job_created()->set_code_version(options_.code_version);
  event.mutable_job_created()->set_plan(PackPlan(plan));
  Emit(new_job.id, std::move(event), now, events);
  Advance(new_job.id, now, events);
  return new_job.id;
}

const TaskState* Core::AttemptOf(const v1::LeaseToken& token) const {
  const auto job = state_.jobs.find(token.job());
  if (job == state_.jobs.end()) return nullptr;
  const TaskState* task = job->second.Find(token.path());
  return task != nullptr && task->epoch == token.epoch() && token.epoch() > 0 ? task : nullptr;
}

StatusOr<std::pair<JobState*, size_t>> Core::Leased(const v1::LeaseToken& token) {
  const TaskState* task = AttemptOf(token);
  if (options_.mutations.ignore_epoch && state_.jobs.contains(token.job())) task = Job(token.job()).Find(token.path());
  if (task == nullptr || task->state != v1::Task::LEASED) {
    ++stale_commits_;
    return Aborted("STALE_LEASE: epoch ", token.epoch(), " of ", token.job(), "/", token.path(),
                   " is not its current lease; stop this attempt and forget it");
  }
  JobState& job = Job(token.job());
  return std::make_pair(&job, job.index.at(token.path()));
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
    event.mutable_task_note()->mutable_note()->set_code(Cut(note.code(), 100));
    event.mutable_task_note()->mutable_note()->set_text(Cut(note.text()));
    Emit(job.id, std::move(event), now, events);
  }
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
  RF_RETURN_IF_ERROR(read_only_);
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
  Advance(job.id, now, events);
  return absl::OkStatus();
}

Status Core::CompleteWithError(JobState& job, size_t i, v1::TaskError error, const Now& now, Events* events) {
  error.set_failure_class(ClassOf(error));
  error.set_message(Cut(error.message()));
  if (TakeLosses(job, i, &error, now, events)) return absl::OkStatus();
  TaskState& task = job.tasks[i];
  const uint32_t attempts = job.created.policy().budget().attempts();
  const bool may_retry = MayRetry(task, error.failure_class()) && (attempts == 0 || job.attempts < attempts);
  EmitFailed(job, i, error, may_retry, now, events);
  ReleaseGang(job.id, task.gang, job.plan.tasks[i].path, now, events);
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
  RF_RETURN_IF_ERROR(read_only_);
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
  if (task.release_at.count() >= 0) EmitReleased(job, leased.second, now, events);  // somebody waits for its place
  return absl::OkStatus();
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

std::vector<Core::ReadyTask> Core::ReadyTasks(const Now& now, size_t limit) const {
  std::vector<ReadyTask> ready;
  std::set<std::string> coming;  // identities that are listed already
  std::map<int32_t, std::set<JobKey>, std::greater<>> levels;
  for (const auto& [priority, tenants] : state_.queues) {
    for (const auto& [tenant, jobs] : tenants) levels[priority].insert(jobs.begin(), jobs.end());
  }
  for (const auto& [priority, jobs] : levels) {
    for (const auto& [seq, id] : jobs) {
      const JobState& job = state_.jobs.at(id);
      std::set<size_t> positions;
      for (const auto& [kind, tasks] : job.ready) positions.insert(tasks.begin(), tasks.end());
      for (const size_t i : positions) {
        if (ready.size() == limit) return ready;
        const TaskState& task = job.tasks[i];
        if (task.not_before > now.steady || state_.running.contains(task.digest)) continue;
        if (!task.digest.empty() && !coming.insert(task.digest).second) continue;
        ready.push_back({.job = id, .path = job.plan.tasks[i].path, .kind = job.plan.tasks[i].kind});
      }
    }
  }
  return ready;
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
