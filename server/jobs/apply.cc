#include <cmath>

#include "server/jobs/state.h"

namespace refinery::jobs {
namespace {

constexpr size_t kMaxNotesPerJob = 2000;

// One event being taken in.
class Applier {
 public:
  Applier(State& state, const v1::Event& event, const std::string& code_version)
      : state_(state), event_(event), code_version_(code_version) {}

  Status Run() {
    if (event_.seq() != state_.last_seq + 1) return Misfit(Join("it does not follow event ", state_.last_seq));
    if (event_.kind_case() == v1::Event::kJobCreated) {
      RF_RETURN_IF_ERROR(CreateJob());
    } else {
      const auto found = state_.jobs.find(event_.job());
      if (found == state_.jobs.end()) return Misfit(Join("there is no job ", event_.job()));
      job_ = &found->second;
      if (IsTerminal(job_->state)) return Misfit(Join("job ", event_.job(), " has ended"));
      RF_RETURN_IF_ERROR(ChangeJob());
    }
    job_->last_seq = state_.last_seq = event_.seq();
    return absl::OkStatus();
  }

 private:
  Status Misfit(std::string_view why) const {
    return DataLoss("event ", event_.seq(), " of the log does not fit: ", why);
  }

  Status ChangeJob() {
    switch (event_.kind_case()) {
      case v1::Event::kJobFinished: return FinishJob();
      case v1::Event::kJobCancelRequested: return RequestCancel();
      case v1::Event::kTaskLeased: return OnTask(event_.task_leased(), &Applier::Leased);
      case v1::Event::kTaskFinished: return OnTask(event_.task_finished(), &Applier::Finished);
      case v1::Event::kTaskFailed: return OnTask(event_.task_failed(), &Applier::Failed);
      case v1::Event::kLeaseExpired: return OnTask(event_.lease_expired(), &Applier::Expired);
      case v1::Event::kCheckpointCommitted: return OnTask(event_.checkpoint_committed(), &Applier::Checkpoint);
      case v1::Event::kTaskNote:
        if (job_->notes.size() < kMaxNotesPerJob) job_->notes.push_back(event_);
        return absl::OkStatus();
      case v1::Event::kTrialSuggested: return SuggestTrial();
      case v1::Event::kTrialFinished: return FinishTrial();
      case v1::Event::kStudyFinished: return FinishStudy();
      case v1::Event::kReportWritten:
        job_->report = event_.report_written().report();
        return absl::OkStatus();
      default: return Misfit("its kind is unknown; it was written by a newer refineryd");
    }
  }

  // Finds the task that `item` names and calls `handler` with it.
  template <typename Item>
  Status OnTask(const Item& item, void (Applier::*handler)(size_t, TaskState&, const Item&)) {
    const auto found = job_->index.find(item.path());
    if (found == job_->index.end()) return Misfit(Join("job ", job_->id, " has no task ", item.path()));
    (this->*handler)(found->second, job_->tasks[found->second], item);
    return absl::OkStatus();
  }

  Status CreateJob() {
    const v1::JobCreated& created = event_.job_created();
    StatusOr<plan::Plan> plan = plan::MakePlan(created.recipe(), {created.files().begin(), created.files().end()});
    if (!plan.ok()) return Misfit(Message(plan.status()));
    const auto [it, is_new] = state_.jobs.try_emplace(event_.job());
    if (!is_new) return Misfit(Join("there is a job ", event_.job(), " already"));
    job_ = &it->second;
    job_->id = event_.job();
    job_->created_seq = event_.seq();
    job_->created = created;
    job_->create_time_ms = event_.time_ms();
    job_->plan = *std::move(plan);
    state_.order.push_back(job_->id);
    if (!created.request_id().empty()) state_.requests[created.request_id()] = job_->id;

    const std::vector<plan::PlannedTask>& planned = job_->plan.tasks;
    job_->tasks.resize(planned.size());
    job_->dependents.resize(planned.size());
    for (size_t i = 0; i < planned.size(); ++i) {
      job_->index[planned[i].path] = i;
      if (planned[i].kind == v1::TRAIN) job_->train_tasks[{planned[i].trial, planned[i].replicate}] = i;
    }
    for (size_t i = 0; i < planned.size(); ++i) {
      const std::set<std::string> needs(planned[i].needs.begin(), planned[i].needs.end());
      for (const std::string& need : needs) {
        const auto found = job_->index.find(need);
        if (found == job_->index.end()) return Misfit(Join(planned[i].path, " needs the unknown task ", need));
        job_->dependents[found->second].push_back(i);
        ++job_->tasks[i].unmet_needs;
      }
    }
    for (size_t i = 0; i < planned.size(); ++i) MakeReadyIfPossible(i);
    return absl::OkStatus();
  }

  // BLOCKED -> READY once everything the task waits for is there.
  void MakeReadyIfPossible(size_t i) {
    TaskState& task = job_->tasks[i];
    const plan::PlannedTask& planned = job_->plan.tasks[i];
    if (task.state != v1::Task::BLOCKED || task.unmet_needs > 0) return;
    if (planned.kind == v1::TRAIN && static_cast<size_t>(planned.trial) >= job_->trials.size()) return;
    for (const plan::Input& input : planned.inputs) {
      if (input.source == plan::Input::Source::kStudyBest && !job_->study_finished) return;
    }
    Resolve(i);
    task.state = v1::Task::READY;
    job_->ready.insert(i);
  }

  // Fills in what the plan left open: the digests of the inputs and the settings of the trial.
  void Resolve(size_t i) {
    TaskState& task = job_->tasks[i];
    const plan::PlannedTask& planned = job_->plan.tasks[i];
    task.spec = planned.spec;
    task.spec.set_job(job_->id);
    task.spec.set_path(planned.path);
    task.spec.clear_inputs();
    for (const plan::Input& input : planned.inputs) {
      StatusOr<v1::ArtifactRef> source = SourceOf(input);
      if (!source.ok()) {
        task.unresolvable = Message(source.status());
        return;
      }
      v1::ArtifactRef* ref = task.spec.add_inputs();
      *ref = *std::move(source);
      ref->set_name(input.name);
    }
    if (planned.kind == v1::TRAIN) {
      *task.spec.mutable_train()->mutable_settings() = job_->trials[planned.trial].settings();
    }
    // An import names a file that can change under the same name, so it always runs; what follows it is keyed by its output.
    if (planned.kind != v1::IMPORT_MODEL) task.digest = plan::TaskDigest(task.spec, code_version_);
  }

  StatusOr<v1::ArtifactRef> SourceOf(const plan::Input& input) const {
    if (input.source == plan::Input::Source::kFile) {
      v1::ArtifactRef ref;
      ref.set_digest(job_->created.files().at(input.from));
      return ref;
    }
    std::string path = input.from;
    if (input.source == plan::Input::Source::kStudyBest) {
      const auto best = job_->best.find(input.from);
      if (best == job_->best.end()) return NotFound("the study has no feasible trial for '", input.from, "'");
      path = job_->plan.tasks[job_->train_tasks.at({best->second.first, best->second.second})].path;
    }
    const TaskState* source = job_->Find(path);
    if (source == nullptr || source->output.digest().empty()) return NotFound(path, " has no output");
    return source->output;
  }

  // Moves the task to another state, keeping the sets and counts.
  void Move(size_t i, v1::Task::State to) {
    TaskState& task = job_->tasks[i];
    if (IsSettled(task.state)) return;
    job_->ready.erase(i);
    job_->leased.erase(i);
    task.state = to;
    if (to == v1::Task::READY) job_->ready.insert(i);
    if (to == v1::Task::LEASED) job_->leased.insert(i);
    if (to == v1::Task::DEAD && job_->dead < 0) job_->dead = static_cast<int>(i);
    if (IsSettled(to)) ++job_->settled;
    if (to != v1::Task::DONE && to != v1::Task::CACHED) return;
    for (const size_t dependent : job_->dependents[i]) {
      --job_->tasks[dependent].unmet_needs;
      MakeReadyIfPossible(dependent);
    }
  }

  // The task may run again, unless the job is being cancelled.
  void Release(size_t i) { Move(i, job_->state == v1::Job::CANCELLING ? v1::Task::CANCELLED : v1::Task::READY); }

  void Leased(size_t i, TaskState& task, const v1::TaskLeased& leased) {
    task.epoch = leased.epoch();
    task.attempt = leased.attempt();
    task.worker = leased.worker();
    task.incarnation = leased.incarnation();
    task.progress.Clear();
    Move(i, v1::Task::LEASED);
    if (job_->state == v1::Job::PENDING) job_->state = v1::Job::RUNNING;
  }

  void Finished(size_t i, TaskState& task, const v1::TaskFinished& finished) {
    task.output = finished.output();
    task.measurements.assign(finished.measurements().begin(), finished.measurements().end());
    task.error.Clear();
    task.seconds = finished.seconds();
    task.peak_memory_bytes = finished.peak_memory_bytes();
    task.reported_epoch = finished.epoch();
    if (!finished.task_digest().empty()) state_.results[finished.task_digest()] = {task.output, task.measurements};
    if (job_->plan.tasks[i].kind == v1::TRAIN) {
      v1::Replicate* replicate = ReplicateOf(i);
      replicate->set_finished(true);
      replicate->set_adapter_digest(task.output.digest());
      for (const v1::Measurement& measurement : task.measurements) {
        if (measurement.name() == "validation_loss") replicate->set_objective(measurement.value());
      }
    }
    Move(i, finished.cached() ? v1::Task::CACHED : v1::Task::DONE);
    if (job_->state == v1::Job::PENDING) job_->state = v1::Job::RUNNING;
  }

  void Failed(size_t i, TaskState& task, const v1::TaskFailed& failed) {
    task.error = failed.error();
    task.reported_epoch = failed.epoch();
    switch (failed.error().failure_class()) {
      case v1::INFRA: ++task.infra_failures; break;
      case v1::NODE: ++task.node_failures; task.avoid.insert(task.worker); break;
      case v1::RESOURCE: ++task.resource_failures; task.avoid.insert(task.worker); break;
      case v1::POISON: ++task.crashes; break;
      default: break;
    }
    if (failed.retry()) return Release(i);
    // Divergence is a result: of the trial when the task trains, and of everything that only that trial could have fed.
    const bool is_training = job_->plan.tasks[i].kind == v1::TRAIN;
    if (failed.error().failure_class() != v1::NUMERIC || !(is_training || !task.unresolvable.empty())) {
      return Move(i, v1::Task::DEAD);
    }
    if (is_training) {
      ReplicateOf(i)->set_finished(true);
      ReplicateOf(i)->set_infeasible(true);
    }
    Move(i, v1::Task::DONE);
  }

  void Expired(size_t i, TaskState& task, const v1::LeaseExpired&) {
    ++task.crashes;
    Release(i);
  }

  void Checkpoint(size_t, TaskState& task, const v1::CheckpointCommitted& committed) {
    task.checkpoint = committed.checkpoint();
    task.checkpoint_step = committed.step();
    task.crashes = 0;  // it gets on, so it is not what kills its workers
  }

  v1::Replicate* ReplicateOf(size_t i) {
    const plan::PlannedTask& planned = job_->plan.tasks[i];
    v1::Trial& trial = job_->trials[planned.trial];
    while (trial.replicates_size() <= planned.replicate) {
      trial.add_replicates()->set_index(static_cast<uint32_t>(trial.replicates_size() - 1));
    }
    return trial.mutable_replicates(planned.replicate);
  }

  Status SuggestTrial() {
    const v1::Trial& trial = event_.trial_suggested().trial();
    if (trial.index() != job_->trials.size()) return Misfit(Join("trial ", trial.index(), " is out of order"));
    job_->trials.push_back(trial);
    for (const auto& [key, i] : job_->train_tasks) {
      if (key.first == static_cast<int>(trial.index())) MakeReadyIfPossible(i);
    }
    return absl::OkStatus();
  }

  Status FinishTrial() {
    const v1::Trial& trial = event_.trial_finished().trial();
    if (trial.index() >= job_->trials.size()) return Misfit(Join("trial ", trial.index(), " was not suggested"));
    job_->trials[trial.index()] = trial;
    return absl::OkStatus();
  }

  Status FinishStudy() {
    for (const v1::StudyFinished::Best& best : event_.study_finished().best()) {
      const std::pair<int, int> key(best.trial(), best.replicate());
      if (!job_->train_tasks.contains(key)) return Misfit(Join("trial ", key.first, " is not in the plan"));
      job_->best[best.selector()] = {best.trial(), best.replicate()};
    }
    job_->study_finished = true;
    for (size_t i = 0; i < job_->tasks.size(); ++i) MakeReadyIfPossible(i);
    return absl::OkStatus();
  }

  Status RequestCancel() {
    job_->state = v1::Job::CANCELLING;
    job_->reason = event_.job_cancel_requested().reason();
    for (size_t i = 0; i < job_->tasks.size(); ++i) {
      if (job_->tasks[i].state != v1::Task::LEASED) Move(i, v1::Task::CANCELLED);
    }
    return absl::OkStatus();
  }

  Status FinishJob() {
    const v1::JobFinished& finished = event_.job_finished();
    for (size_t i = 0; i < job_->tasks.size(); ++i) Move(i, v1::Task::CANCELLED);
    switch (finished.outcome()) {
      case v1::JobFinished::SUCCEEDED: job_->state = v1::Job::SUCCEEDED; break;
      case v1::JobFinished::CANCELLED: job_->state = v1::Job::CANCELLED; break;
      default: job_->state = v1::Job::FAILED; break;
    }
    job_->reason = finished.reason();
    job_->artifact = finished.artifact();
    if (finished.has_report()) job_->report = finished.report();
    job_->end_time_ms = event_.time_ms();
    return absl::OkStatus();
  }

  State& state_;
  const v1::Event& event_;
  const std::string& code_version_;
  JobState* job_ = nullptr;
};

}  // namespace

const TaskState* JobState::Find(const std::string& path) const {
  const auto found = index.find(path);
  return found == index.end() ? nullptr : &tasks[found->second];
}
TaskState* JobState::Find(const std::string& path) {
  return const_cast<TaskState*>(static_cast<const JobState*>(this)->Find(path));
}

Status Apply(State& state, const v1::Event& event, const std::string& code_version) {
  return Applier(state, event, code_version).Run();
}

}  // namespace refinery::jobs
