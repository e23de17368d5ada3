// The part of the core that needs no command: what follows from the state by itself.

#include "server/jobs/core.h"
#include "server/search/search.h"

namespace refinery::jobs {

void Core::Advance(const std::string& id, const Now& now, Events* events) {
  JobState& job = Job(id);
  while (!IsTerminal(job.state)) {
    bool changed = AdvanceEnd(job, now, events);
    if (!IsTerminal(job.state) && job.state != v1::Job::CANCELLING) {
      changed |= AdvanceStudy(job, now, events);
      if (!IsTerminal(job.state)) changed |= AdvanceReady(job, now, events);
    }
    if (!changed) return;
  }
}

// Ends the job when there is nothing left to do or no way to go on.
bool Core::AdvanceEnd(JobState& job, const Now& now, Events* events) {
  if (job.state == v1::Job::CANCELLING) {
    if (!job.leased.empty()) return false;
    EmitJobFinished(job, v1::JobFinished::CANCELLED, job.reason, now, events);
    return true;
  }
  if (job.dead >= 0) {
    const v1::TaskError& error = job.tasks[job.dead].error;
    EmitJobFinished(job, v1::JobFinished::FAILED,
                    Join("task ", job.plan.tasks[job.dead].path, " failed (", v1::FailureClass_Name(error.failure_class()),
                         "): ", error.message()),
                    now, events);
    return true;
  }
  if (job.settled < job.tasks.size() || job.report.digest().empty()) return false;
  EmitJobFinished(job, v1::JobFinished::SUCCEEDED, "", now, events);
  return true;
}

void Core::EmitJobFinished(const JobState& job, v1::JobFinished::Outcome outcome, const std::string& reason, const Now& now,
                           Events* events) {
  v1::Event event;
  v1::JobFinished* finished = event.mutable_job_finished();
  finished->set_outcome(outcome);
  finished->set_reason(reason.substr(0, limits::kMaxErrorBytes));
  for (size_t i = 0; i < job.tasks.size(); ++i) {
    if (job.plan.tasks[i].kind == v1::EXPORT && !job.tasks[i].output.digest().empty()) {
      *finished->mutable_artifact() = job.tasks[i].output;
    }
  }
  if (!job.report.digest().empty()) *finished->mutable_report() = job.report;
  Emit(job.id, std::move(event), now, events);
}

void Core::Fail(const std::string& id, const std::string& reason, const Now& now, Events* events) {
  JobState& job = Job(id);
  if (!IsTerminal(job.state)) EmitJobFinished(job, v1::JobFinished::FAILED, reason, now, events);
}

// The study: trial finished -> next suggestion -> new READY tasks; all finished -> the best.
bool Core::AdvanceStudy(JobState& job, const Now& now, Events* events) {
  const v1::Recipe& recipe = job.created.recipe();
  const uint32_t count = search::TrialCount(recipe);
  if (job.study_finished || job.train_tasks.empty()) return false;
  bool changed = false;
  for (size_t i = 0; i < job.trials.size(); ++i) {
    v1::Trial trial = job.trials[i];
    if (trial.state() != v1::Trial::ACTIVE) continue;
    const bool done = trial.replicates_size() > 0 && std::all_of(trial.replicates().begin(), trial.replicates().end(),
                                                                 [](const v1::Replicate& r) { return r.finished(); });
    if (!done) continue;
    search::Conclude(&trial);
    v1::Event event;
    *event.mutable_trial_finished()->mutable_trial() = std::move(trial);
    Emit(job.id, std::move(event), now, events);
    changed = true;
  }
  while (job.trials.size() < count) {
    const auto next = static_cast<uint32_t>(job.trials.size());
    if (!search::CanSuggest(recipe, job.trials, next)) return changed;
    StatusOr<v1::Trial> trial = search::Suggest(recipe, job.trials, next);
    if (!trial.ok()) {
      EmitJobFinished(job, v1::JobFinished::FAILED, Join("the search cannot go on: ", Message(trial.status())), now, events);
      return true;
    }
    v1::Event event;
    *event.mutable_trial_suggested()->mutable_trial() = *std::move(trial);
    Emit(job.id, std::move(event), now, events);
    changed = true;
  }
  for (const v1::Trial& trial : job.trials) {
    if (trial.state() == v1::Trial::ACTIVE || trial.state() == v1::Trial::REQUESTED) return changed;
  }
  v1::Event event;
  event.mutable_study_finished();
  for (v1::StudyFinished::Best& best : search::SelectBest(job.trials)) {
    *event.mutable_study_finished()->add_best() = std::move(best);
  }
  Emit(job.id, std::move(event), now, events);
  if (!job.best.contains("best")) {
    EmitJobFinished(job, v1::JobFinished::FAILED,
                    "every trial diverged (NaN or Inf loss); lower the learning rates in search.parameters", now, events);
  }
  return true;
}

// Tasks that end without running: their result is known, or their input can never exist.
bool Core::AdvanceReady(JobState& job, const Now& now, Events* events) {
  bool changed = false;
  const std::set<size_t> ready = job.ready;
  for (const size_t i : ready) {
    TaskState& task = job.tasks[i];
    if (!task.unresolvable.empty()) {
      v1::TaskError error;
      error.set_failure_class(v1::NUMERIC);
      error.set_code(static_cast<int>(absl::StatusCode::kNotFound));
      error.set_message(task.unresolvable);
      EmitFailed(job, i, error, false, now, events);
      changed = true;
    } else if (!task.cache_checked) {
      task.cache_checked = true;
      changed |= TakeFromCache(job, i, now, events);
    }
  }
  return changed;
}

bool Core::TakeFromCache(JobState& job, size_t i, const Now& now, Events* events) {
  const TaskState& task = job.tasks[i];
  const auto result = task.digest.empty() ? state_.results.end() : state_.results.find(task.digest);
  if (result == state_.results.end() || !options_.is_complete(result->second.output.digest())) return false;
  v1::Event event;
  v1::TaskFinished* finished = event.mutable_task_finished();
  finished->set_path(job.plan.tasks[i].path);
  finished->set_epoch(task.epoch);
  *finished->mutable_output() = result->second.output;
  for (const v1::Measurement& measurement : result->second.measurements) *finished->add_measurements() = measurement;
  finished->set_cached(true);
  finished->set_task_digest(task.digest);
  Emit(job.id, std::move(event), now, events);
  return true;
}

std::vector<std::string> Core::JobsWithoutReport() const {
  std::vector<std::string> ids;
  for (const std::string& id : state_.order) {
    const JobState& job = state_.jobs.at(id);
    const bool running = job.state == v1::Job::RUNNING || job.state == v1::Job::PENDING;
    if (running && job.dead < 0 && job.settled == job.tasks.size() && job.report.digest().empty()) ids.push_back(id);
  }
  return ids;
}

Status Core::WriteReport(const std::string& id, const v1::ArtifactRef& report, const Now& now, Events* events) {
  RF_ASSIGN_OR_RETURN(const JobState* job, FindJob(id));
  if (IsTerminal(job->state) || !job->report.digest().empty()) return absl::OkStatus();
  v1::Event event;
  *event.mutable_report_written()->mutable_report() = report;
  Emit(id, std::move(event), now, events);
  Advance(id, now, events);
  return absl::OkStatus();
}

}  // namespace refinery::jobs
