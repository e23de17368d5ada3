// Events of tasks. Those of jobs, studies and tenants: apply.cc.

#include "server/jobs/applier.h"

namespace refinery::jobs {
namespace {

StatusOr<v1::ArtifactRef> SourceOf(const JobState& job, const plan::Input& input) {
  if (input.source == plan::Input::Source::kFile) {
    const auto file = job.created.files().find(input.from);
    if (file == job.created.files().end()) return NotFound("the file '", input.from, "' was not uploaded with the job");
    v1::ArtifactRef ref;
    ref.set_digest(file->second);
    return ref;
  }
  const TaskState* source = nullptr;
  if (input.source == plan::Input::Source::kStudyBest) {
    const auto best = job.best.find(input.from);
    if (best == job.best.end()) return NotFound("the study has no feasible trial for '", input.from, "'");
    source = &job.tasks[job.train_tasks.at({best->second.first, best->second.second})];
  } else {
    source = job.Find(input.from);
  }
  if (source == nullptr || source->output.digest().empty()) return NotFound(input.from, " has no output");
  return source->output;
}

}  // namespace

Status Applier::ChangeTask() {
  switch (event_.kind_case()) {
    case v1::Event::kTaskLeased: return OnTask(event_.task_leased(), &Applier::Leased);
    case v1::Event::kTaskFinished: return OnTask(event_.task_finished(), &Applier::Finished);
    case v1::Event::kTaskFailed: return OnTask(event_.task_failed(), &Applier::Failed);
    case v1::Event::kLeaseExpired: return OnTask(event_.lease_expired(), &Applier::Expired);
    case v1::Event::kLeaseReleased: return OnTask(event_.lease_released(), &Applier::Released);
    case v1::Event::kCheckpointCommitted: return OnTask(event_.checkpoint_committed(), &Applier::Checkpoint);
    case v1::Event::kArtifactLost: return OnTask(event_.artifact_lost(), &Applier::Lost);
    default: return Misfit("its kind is unknown; it was written by a newer refineryd");
  }
}

void Applier::MakeReadyIfPossible(size_t i) {
  TaskState& task = job_->tasks[i];
  const plan::PlannedTask& planned = job_->plan.tasks[i];
  if (task.state != v1::Task::BLOCKED || task.unmet_needs > 0) return;
  if (planned.kind == v1::TRAIN && static_cast<size_t>(planned.trial) >= job_->trials.size()) return;
  for (const plan::Input& input : planned.inputs) {
    if (input.source == plan::Input::Source::kStudyBest && !job_->study_finished) return;
  }
  Resolve(*job_, i);
  // An import names a file that can change under the same name, so it always runs; what follows it is keyed by its output.
  const bool reusable = task.unresolvable.empty() && planned.kind != v1::IMPORT_MODEL;
  std::string digest = reusable ? plan::TaskDigest(task.spec, job_->created.code_version()) : "";
  if (!task.digest.empty() && digest != task.digest) {  // a lost input came out otherwise: its checkpoint is of another task
    task.checkpoint.Clear();
    task.checkpoint_step = 0;
  }
  task.digest = std::move(digest);
  SetState(i, v1::Task::READY);
}

void Applier::Resolve(JobState& job, size_t i) {
  TaskState& task = job.tasks[i];
  const plan::PlannedTask& planned = job.plan.tasks[i];
  task.resolved = true;
  task.unresolvable.clear();
  task.spec = planned.spec;
  task.spec.set_job(job.id);
  task.spec.set_path(planned.path);
  task.spec.clear_inputs();
  for (const plan::Input& input : planned.inputs) {
    StatusOr<v1::ArtifactRef> source = SourceOf(job, input);
    if (!source.ok()) {
      task.unresolvable = Message(source.status());
      return;
    }
    v1::ArtifactRef* ref = task.spec.add_inputs();
    *ref = *std::move(source);
    ref->set_name(input.name);
  }
  if (planned.kind == v1::TRAIN) *task.spec.mutable_train()->mutable_settings() = job.trials[planned.trial].settings();
}

void Applier::Move(size_t i, v1::Task::State to) {
  const TaskState& task = job_->tasks[i];
  if (IsSettled(task.state)) return;
  SetState(i, to);
  if (to != v1::Task::DONE && to != v1::Task::CACHED) return;
  for (const size_t dependent : job_->dependents[i]) {
    --job_->tasks[dependent].unmet_needs;
    MakeReadyIfPossible(dependent);
    if (task.losses > 0) ResolveAgain(dependent);  // it may have run, or run now, with what was made before
  }
}

void Applier::ResolveAgain(size_t i) {
  TaskState& task = job_->tasks[i];
  if (!task.resolved) return;
  const std::string unresolvable = task.unresolvable;
  Resolve(*job_, i);
  task.unresolvable = unresolvable;
}

void Applier::SetState(size_t i, v1::Task::State to) {
  TaskState& task = job_->tasks[i];
  const v1::TaskKind kind = job_->plan.tasks[i].kind;
  if (task.state == v1::Task::READY) {
    const auto ready = job_->ready.find(kind);
    ready->second.erase(i);
    if (ready->second.empty()) job_->ready.erase(ready);
  }
  if (task.state == v1::Task::LEASED) {
    job_->leased.erase(i);
    IndexLease(state_, *job_, i, false);
  }
  task.state = to;
  if (to == v1::Task::READY) {
    job_->ready[kind].insert(i);
    job_->fresh.push_back(i);
  }
  if (to == v1::Task::LEASED) {
    job_->leased.insert(i);
    IndexLease(state_, *job_, i, true);
  }
  if (to == v1::Task::DEAD && job_->dead < 0) job_->dead = static_cast<int>(i);
  if (IsSettled(to)) ++job_->settled;
}

void Applier::Leased(size_t i, TaskState& task, const v1::TaskLeased& leased) {
  if (task.state == v1::Task::LEASED) Move(i, v1::Task::READY);  // no log of ours has that; the indexes stay right all the same
  task.epoch = leased.epoch();
  task.attempt = leased.attempt();
  task.worker = leased.worker();
  task.incarnation = leased.incarnation();
  task.gang = leased.gang();
  task.progress.Clear();
  task.missing_since = task.release_at = std::chrono::milliseconds(-1);
  task.slowest_step = std::chrono::milliseconds(0);
  ++job_->attempts;
  job_->workers.insert(leased.worker());
  Move(i, v1::Task::LEASED);
  if (job_->state == v1::Job::PENDING) job_->state = v1::Job::RUNNING;
}

void Applier::Finished(size_t i, TaskState& task, const v1::TaskFinished& finished) {
  task.output = finished.output();
  task.measurements.assign(finished.measurements().begin(), finished.measurements().end());
  task.error.Clear();
  task.seconds = finished.seconds();
  task.peak_memory_bytes = finished.peak_memory_bytes();
  if (!finished.cached()) task.reported_epoch = finished.epoch();  // a cached result is no word of the attempt that was lost before
  const v1::TaskKind kind = job_->plan.tasks[i].kind;
  if (!finished.cached()) job_->device_seconds += finished.seconds() * std::max(1u, job_->RequirementsOf(kind).devices());
  if (!finished.task_digest().empty()) state_.results[finished.task_digest()] = {task.output, task.measurements};
  if (kind == v1::TRAIN) {
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

void Applier::Failed(size_t i, TaskState& task, const v1::TaskFailed& failed) {
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

void Applier::Expired(size_t i, TaskState& task, const v1::LeaseExpired& expired) {
  if (expired.cause() == v1::LeaseExpired::DROPPED) {
    ++task.infra_failures;  // its worker lives: the task has not killed it
  } else {
    ++task.crashes;
  }
  Release(i);
}

void Applier::Released(size_t i, TaskState&, const v1::LeaseReleased&) { Release(i); }

void Applier::Checkpoint(size_t, TaskState& task, const v1::CheckpointCommitted& committed) {
  task.checkpoint = committed.checkpoint();
  task.checkpoint_step = committed.step();
  task.crashes = 0;  // it gets on, so it is not what kills its workers
}

void Applier::Lost(size_t i, TaskState& task, const v1::ArtifactLost& lost) {
  task.checkpoint.Clear();
  task.checkpoint_step = 0;
  if (lost.checkpoint() || (task.state != v1::Task::DONE && task.state != v1::Task::CACHED)) return;
  ++task.losses;
  task.output.Clear();
  --job_->settled;
  SetState(i, v1::Task::BLOCKED);
  for (const size_t dependent : job_->dependents[i]) {
    TaskState& other = job_->tasks[dependent];
    ++other.unmet_needs;
    if (other.state == v1::Task::READY) SetState(dependent, v1::Task::BLOCKED);
    ResolveAgain(dependent);
  }
  MakeReadyIfPossible(i);
}

v1::Replicate* Applier::ReplicateOf(size_t i) {
  const plan::PlannedTask& planned = job_->plan.tasks[i];
  v1::Trial& trial = job_->trials[planned.trial];
  while (trial.replicates_size() <= planned.replicate) {
    trial.add_replicates()->set_index(static_cast<uint32_t>(trial.replicates_size() - 1));
  }
  job_->study_changed = true;
  return trial.mutable_replicates(planned.replicate);
}

}  // namespace refinery::jobs
