// The part of the core that needs no command: what follows from the state by itself.

#include <algorithm>

#include "server/jobs/core.h"
#include "server/jobs/text.h"
#include "server/search/search.h"

namespace refinery::jobs {

void Core::Advance(const std::string& id, const Now& now, Events* events) {
  JobState& job = Job(id);
  while (!IsTerminal(job.state)) {
    bool changed = AdvanceEnd(job, now, events);
    if (!IsTerminal(job.state) && job.state != v1::Job::CANCELLING) {
      changed |= AdvanceBudget(job, now, events);
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
  finished->set_reason(Cut(reason));
  for (size_t i = 0; i < job.tasks.size(); ++i) {
    if (job.plan.tasks[i].kind == v1::EXPORT && !job.tasks[i].output.digest().empty()) {
      *finished->mutable_artifact() = job.tasks[i].output;
    }
  }
  if (!finished->has_artifact()) {
    for (const v1::StudyFinished::Best& best : search::SelectBest(job.trials)) {
      const auto task = job.train_tasks.find({best.trial(), best.replicate()});
      if (best.selector() == "best" && task != job.train_tasks.end()) *finished->mutable_best() = job.tasks[task->second].output;
    }
  }
  if (!job.report.digest().empty()) *finished->mutable_report() = job.report;
  Emit(job.id, std::move(event), now, events);
}

void Core::Fail(const std::string& id, const std::string& reason, const Now& now, Events* events) {
  JobState& job = Job(id);
  if (read_only_.ok() && !IsTerminal(job.state)) EmitJobFinished(job, v1::JobFinished::FAILED, reason, now, events);
}

// Notices that the budget is used up.
bool Core::AdvanceBudget(JobState& job, const Now& now, Events* events) {
  const v1::Budget& budget = job.created.policy().budget();
  if (!job.exhausted.empty() || !job.created.policy().has_budget() || job.state == v1::Job::PAUSED) return false;
  const auto trials = std::count_if(job.trials.begin(), job.trials.end(), [](const v1::Trial& trial) {
    return trial.state() == v1::Trial::SUCCEEDED || trial.state() == v1::Trial::INFEASIBLE;
  });
  const int64_t wall = now.unix_ms - job.create_time_ms - static_cast<int64_t>(job.paused_ms);
  std::string what;
  if (budget.wall_ms() > 0 && wall >= static_cast<int64_t>(budget.wall_ms())) {
    what = Join("wall time: ", wall, " of ", budget.wall_ms(), " ms");
  } else if (budget.device_seconds() > 0 && job.device_seconds >= budget.device_seconds()) {
    what = Join("device time: ", job.device_seconds, " of ", budget.device_seconds(), " s");
  } else if (budget.trials() > 0 && trials >= budget.trials()) {
    what = Join("trials: ", trials, " of ", budget.trials());
  } else if (budget.attempts() > 0 && job.attempts >= budget.attempts()) {
    what = Join("attempts: ", job.attempts, " of ", budget.attempts());
  }
  if (what.empty()) return false;
  v1::Event event;
  event.mutable_budget_exhausted()->set_what(what);
  Emit(job.id, std::move(event), now, events);
  return true;
}

// The study: trial finished -> next suggestion -> new READY tasks; all finished, or the budget used up -> the best.
bool Core::AdvanceStudy(JobState& job, const Now& now, Events* events) {
  if (job.study_finished || job.train_tasks.empty() || !job.study_changed) return false;
  job.study_changed = false;
  const v1::Recipe& recipe = job.created.recipe();
  const uint32_t count = search::TrialCount(recipe);
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
  if (changed && AdvanceBudget(job, now, events)) return true;
  while (job.trials.size() < count && (job.exhausted.empty() || job.trials.empty())) {
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
  const auto has = [&](v1::Trial::State state) {
    return std::any_of(job.trials.begin(), job.trials.end(), [&](const v1::Trial& trial) { return trial.state() == state; });
  };
  const bool open = has(v1::Trial::ACTIVE) || has(v1::Trial::REQUESTED);
  if (open && (job.exhausted.empty() || !has(v1::Trial::SUCCEEDED))) return changed;
  FinishStudy(job, open || job.trials.size() < count, now, events);
  return true;
}

void Core::FinishStudy(JobState& job, bool early, const Now& now, Events* events) {
  v1::Event event;
  event.mutable_study_finished()->set_early(early);
  for (v1::StudyFinished::Best& best : search::SelectBest(job.trials)) {
    *event.mutable_study_finished()->add_best() = std::move(best);
  }
  Emit(job.id, std::move(event), now, events);
  if (job.best.contains("best")) return;
  EmitJobFinished(job, v1::JobFinished::FAILED,
                  "every trial diverged (NaN or Inf loss); lower the learning rates in search.parameters", now, events);
}

// Tasks that end without running: their result is known, or their input can never exist.
bool Core::AdvanceReady(JobState& job, const Now& now, Events* events) {
  bool changed = false;
  std::vector<size_t> fresh;
  fresh.swap(job.fresh);
  for (const size_t i : fresh) {
    TaskState& task = job.tasks[i];
    if (task.state != v1::Task::READY) continue;
    task.ready_since = now.steady;
    if (task.unresolvable.empty()) {
      changed |= TakeFromCache(job, i, now, events);
      continue;
    }
    EmitFailed(job, i, MakeError(v1::NUMERIC, absl::StatusCode::kNotFound, task.unresolvable), false, now, events);
    changed = true;
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
  for (const auto& [seq, id] : state_.active) {
    const JobState& job = state_.jobs.at(id);
    const bool running = job.state == v1::Job::RUNNING || job.state == v1::Job::PENDING;
    if (running && job.dead < 0 && job.settled == job.tasks.size() && job.report.digest().empty()) ids.push_back(id);
  }
  return ids;
}

Status Core::WriteReport(const std::string& id, const v1::ArtifactRef& report, const Now& now, Events* events) {
  RF_ASSIGN_OR_RETURN(const JobState* job, FindJob(id));
  if (IsTerminal(job->state) || !job->report.digest().empty()) return absl::OkStatus();
  RF_RETURN_IF_ERROR(read_only_);
  v1::Event event;
  *event.mutable_report_written()->mutable_report() = report;
  Emit(id, std::move(event), now, events);
  Advance(id, now, events);
  return absl::OkStatus();
}

}  // namespace refinery::jobs
