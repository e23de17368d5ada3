// Events of jobs, studies and tenants. Those of tasks: apply_task.cc.

#include <algorithm>

#include "server/jobs/applier.h"
#include "server/jobs/stored_plan.h"

namespace refinery::jobs {

Status Applier::Run() {
  if (event_.seq() != state_.last_seq + 1) return Misfit(Join("it does not follow event ", state_.last_seq));
  if (event_.version() > kEventVersion) return Misfit("it was written by a newer refineryd");
  if (event_.has_tenant_changed() || event_.has_request_answered()) {  // of no job
    if (event_.has_tenant_changed()) RF_RETURN_IF_ERROR(ChangeTenant());
    state_.last_seq = event_.seq();
    TakeMark();
    return absl::OkStatus();
  }
  if (event_.kind_case() == v1::Event::kJobCreated) {
    RF_RETURN_IF_ERROR(CreateJob());
  } else {
    const auto found = state_.jobs.find(event_.job());
    if (found == state_.jobs.end()) return Misfit(Join("there is no job ", event_.job()));
    job_ = &found->second;
    if (IsTerminal(job_->state) && !event_.has_job_retried()) return Misfit(Join("job ", event_.job(), " has ended"));
    RF_RETURN_IF_ERROR(ChangeJob());
  }
  job_->last_seq = state_.last_seq = event_.seq();
  TakeMark();
  Index(state_, *job_);
  return absl::OkStatus();
}

void Applier::TakeMark() {
  if (event_.has_request()) state_.answered.Add(event_.request().key(), event_.request().digest(), event_.time_ms());
}

Status Applier::ChangeJob() {
  switch (event_.kind_case()) {
    case v1::Event::kJobFinished: return FinishJob();
    case v1::Event::kJobCancelRequested: return RequestCancel();
    case v1::Event::kJobPaused: return Pause();
    case v1::Event::kJobResumed: return Resume();
    case v1::Event::kJobRetried: return Retry();
    case v1::Event::kJobPolicyChanged:
      Unqueue(state_, *job_);  // its place in the queues depends on what changes now
      *job_->created.mutable_policy() = event_.job_policy_changed().policy();
      return absl::OkStatus();
    case v1::Event::kTaskNote:
      if (job_->notes.size() < kMaxNotesPerJob) job_->notes.push_back(event_);
      return absl::OkStatus();
    case v1::Event::kTrialSuggested: return SuggestTrial();
    case v1::Event::kTrialFinished: return FinishTrial();
    case v1::Event::kStudyFinished: return FinishStudy();
    case v1::Event::kReportWritten:
      job_->report = event_.report_written().report();
      return absl::OkStatus();
    case v1::Event::kBudgetExhausted:
      job_->exhausted = event_.budget_exhausted().what();
      job_->study_changed = true;
      return absl::OkStatus();
    default: return ChangeTask();
  }
}

Status Applier::ChangeTenant() {
  const v1::TenantPolicy& policy = event_.tenant_changed().policy();
  if (policy.tenant().empty()) return Misfit("it names no tenant");
  state_.tenants[policy.tenant()] = policy;
  return absl::OkStatus();
}

Status Applier::Plan(JobState& job, const std::string& code_version) {
  if (job.created.code_version().empty()) job.created.set_code_version(code_version);
  StatusOr<plan::Plan> plan =
      job.created.plan().empty()
          ? plan::MakePlan(job.created.recipe(), {job.created.files().begin(), job.created.files().end()})
          : UnpackPlan(job.created.plan());
  RF_RETURN_IF_ERROR(plan.status());
  job.plan = *std::move(plan);
  const std::vector<plan::PlannedTask>& planned = job.plan.tasks;
  job.tasks.resize(planned.size());
  job.dependents.resize(planned.size());
  job.index.reserve(planned.size());
  for (size_t i = 0; i < planned.size(); ++i) {
    if (!job.index.emplace(planned[i].path, i).second) return DataLoss("the plan has the task ", planned[i].path, " twice");
    // Every trial and replicate is a task, so neither number reaches that of the tasks.
    if (planned[i].kind == v1::TRAIN && std::max<size_t>(planned[i].trial, planned[i].replicate) >= planned.size()) {
      return DataLoss(planned[i].path, " is of a trial or replicate that the plan cannot have");
    }
    if (planned[i].kind == v1::TRAIN) job.train_tasks[{planned[i].trial, planned[i].replicate}] = i;
  }
  for (size_t i = 0; i < planned.size(); ++i) {
    const std::set<std::string_view> needs(planned[i].needs.begin(), planned[i].needs.end());
    for (const std::string_view need : needs) {
      const auto found = job.index.find(std::string(need));
      if (found == job.index.end()) return DataLoss(planned[i].path, " needs the unknown task ", need);
      job.dependents[found->second].push_back(i);
      ++job.tasks[i].unmet_needs;
    }
  }
  return absl::OkStatus();
}

Status Applier::CreateJob() {
  const v1::JobCreated& created = event_.job_created();
  JobState job;
  job.id = event_.job();
  job.created_seq = event_.seq();
  job.created = created;
  job.create_time_ms = event_.time_ms();
  const Status planned = Plan(job, code_version_);
  if (!planned.ok()) return Misfit(Message(planned));
  const auto [it, is_new] = state_.jobs.try_emplace(event_.job(), std::move(job));
  if (!is_new) return Misfit(Join("there is a job ", event_.job(), " already"));
  job_ = &it->second;
  state_.order.push_back(job_->id);
  if (!created.request_id().empty()) state_.requests[created.request_id()] = job_->id;
  for (size_t i = 0; i < job_->tasks.size(); ++i) MakeReadyIfPossible(i);
  return absl::OkStatus();
}

Status Applier::SuggestTrial() {
  const v1::Trial& trial = event_.trial_suggested().trial();
  if (trial.index() != job_->trials.size()) return Misfit(Join("trial ", trial.index(), " is out of order"));
  job_->trials.push_back(trial);
  job_->study_changed = true;
  const int index = static_cast<int>(trial.index());
  for (auto it = job_->train_tasks.lower_bound({index, 0}); it != job_->train_tasks.end() && it->first.first == index; ++it) {
    MakeReadyIfPossible(it->second);
  }
  return absl::OkStatus();
}

Status Applier::FinishTrial() {
  const v1::Trial& trial = event_.trial_finished().trial();
  if (trial.index() >= job_->trials.size()) return Misfit(Join("trial ", trial.index(), " was not suggested"));
  job_->trials[trial.index()] = trial;
  job_->study_changed = true;
  return absl::OkStatus();
}

Status Applier::FinishStudy() {
  for (const v1::StudyFinished::Best& best : event_.study_finished().best()) {
    const std::pair<int, int> key(best.trial(), best.replicate());
    if (!job_->train_tasks.contains(key)) return Misfit(Join("trial ", key.first, " is not in the plan"));
    job_->best[best.selector()] = {best.trial(), best.replicate()};
  }
  job_->study_finished = true;
  for (const auto& [key, i] : job_->train_tasks) {
    // One that was done and lost its output is no trial that goes on.
    if (!event_.study_finished().early() || IsSettled(job_->tasks[i].state) || job_->tasks[i].losses > 0) continue;
    Move(i, v1::Task::CANCELLED);
    for (const size_t dependent : job_->dependents[i]) --job_->tasks[dependent].unmet_needs;
  }
  for (v1::Trial& trial : job_->trials) {
    if (trial.state() == v1::Trial::ACTIVE || trial.state() == v1::Trial::REQUESTED) trial.set_state(v1::Trial::STOPPED_EARLY);
  }
  for (size_t i = 0; i < job_->tasks.size(); ++i) MakeReadyIfPossible(i);
  return absl::OkStatus();
}

Status Applier::RequestCancel() {
  job_->state = v1::Job::CANCELLING;
  job_->paused_time_ms = 0;
  job_->reason = event_.job_cancel_requested().reason();
  for (size_t i = 0; i < job_->tasks.size(); ++i) {
    if (job_->tasks[i].state != v1::Task::LEASED) Move(i, v1::Task::CANCELLED);
  }
  return absl::OkStatus();
}

Status Applier::Pause() {
  if (job_->state != v1::Job::PENDING && job_->state != v1::Job::RUNNING) return Misfit("the job is not running");
  job_->state = v1::Job::PAUSED;
  job_->reason = event_.job_paused().reason();
  job_->paused_time_ms = event_.time_ms();
  return absl::OkStatus();
}

Status Applier::Resume() {
  if (job_->state != v1::Job::PAUSED) return Misfit("the job is not paused");
  job_->state = job_->attempts > 0 || job_->settled > 0 ? v1::Job::RUNNING : v1::Job::PENDING;
  job_->reason.clear();
  job_->paused_time_ms = 0;
  job_->paused_ms += event_.job_resumed().paused_ms();
  return absl::OkStatus();
}

Status Applier::Retry() {
  if (job_->state != v1::Job::FAILED && job_->state != v1::Job::CANCELLED) return Misfit("the job has not failed");
  job_->state = v1::Job::RUNNING;
  ++job_->retries;
  job_->reason.clear();
  job_->end_time_ms = 0;
  job_->artifact.Clear();
  job_->best_artifact.Clear();
  job_->dead = -1;
  job_->study_changed = true;
  for (size_t i = 0; i < job_->tasks.size(); ++i) {
    TaskState& task = job_->tasks[i];
    if (task.state != v1::Task::DEAD && task.state != v1::Task::CANCELLED) continue;
    // Trials that were given up stay so: the study has its result.
    if (job_->study_finished && job_->plan.tasks[i].kind == v1::TRAIN && task.state == v1::Task::CANCELLED && task.losses == 0) {
      continue;
    }
    task.state = v1::Task::BLOCKED;
    --job_->settled;
    task.infra_failures = task.node_failures = task.resource_failures = task.crashes = 0;
    task.avoid.clear();
  }
  for (size_t i = 0; i < job_->tasks.size(); ++i) MakeReadyIfPossible(i);
  return absl::OkStatus();
}

Status Applier::FinishJob() {
  const v1::JobFinished& finished = event_.job_finished();
  for (size_t i = 0; i < job_->tasks.size(); ++i) Move(i, v1::Task::CANCELLED);
  switch (finished.outcome()) {
    case v1::JobFinished::SUCCEEDED: job_->state = v1::Job::SUCCEEDED; break;
    case v1::JobFinished::CANCELLED: job_->state = v1::Job::CANCELLED; break;
    default: job_->state = v1::Job::FAILED; break;
  }
  job_->paused_time_ms = 0;
  job_->reason = finished.reason();
  job_->artifact = finished.artifact();
  job_->best_artifact = finished.best();
  if (finished.has_report()) job_->report = finished.report();
  job_->end_time_ms = event_.time_ms();
  return absl::OkStatus();
}

void Applier::Index(State& state, const JobState& job) {
  const JobKey key(job.created_seq, job.id);
  if (IsTerminal(job.state)) {
    state.active.erase(key);
  } else {
    state.active.insert(key);
  }
  const bool offered = !job.ready.empty() && (job.state == v1::Job::PENDING || job.state == v1::Job::RUNNING);
  if (offered) {
    state.queues[job.priority()][job.tenant()].insert(key);
  } else {
    Unqueue(state, job);
  }
}

void Applier::Unqueue(State& state, const JobState& job) {
  const auto level = state.queues.find(job.priority());
  if (level == state.queues.end()) return;
  const auto queue = level->second.find(job.tenant());
  if (queue == level->second.end()) return;
  queue->second.erase({job.created_seq, job.id});
  if (queue->second.empty()) level->second.erase(queue);
  if (level->second.empty()) state.queues.erase(level);
}

void Applier::IndexLease(State& state, const JobState& job, size_t i, bool leased) {
  const LeaseKey key(job.id, i);
  const TaskState& task = job.tasks[i];
  if (leased) {
    state.leases.insert(key);
    state.worker_leases[task.worker].insert(key);
    if (!task.digest.empty()) ++state.running[task.digest];
    return;
  }
  state.leases.erase(key);
  const auto held = state.worker_leases.find(task.worker);
  if (held != state.worker_leases.end()) {
    held->second.erase(key);
    if (held->second.empty()) state.worker_leases.erase(held);
  }
  const auto running = state.running.find(task.digest);
  if (running != state.running.end() && --running->second == 0) state.running.erase(running);
}

const TaskState* JobState::Find(const std::string& path) const {
  const auto found = index.find(path);
  return found == index.end() ? nullptr : &tasks[found->second];
}
TaskState* JobState::Find(const std::string& path) {
  return const_cast<TaskState*>(static_cast<const JobState*>(this)->Find(path));
}

const std::string& JobState::tenant() const {
  static const std::string* const kDefault = new std::string("default");
  return created.policy().tenant().empty() ? *kDefault : created.policy().tenant();
}

const v1::Requirements& JobState::RequirementsOf(v1::TaskKind kind) const {
  const auto& by_kind = created.policy().by_kind();
  if (by_kind.empty()) return created.policy().requirements();
  const auto own = by_kind.find(KindName(kind));
  return own == by_kind.end() ? created.policy().requirements() : own->second;
}

Status Apply(State& state, const v1::Event& event, const std::string& code_version) {
  return Applier(state, event, code_version).Run();
}

}  // namespace refinery::jobs
