// The state as bytes, for compaction of the log and a fast restart (proto/refinery/v1/snapshot.proto).

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>

#include <algorithm>

#include "refinery/v1/snapshot.pb.h"
#include "server/jobs/applier.h"

namespace refinery::jobs {
namespace {

constexpr uint32_t kSnapshotVersion = 1;

void Put(const TaskState& task, v1::TaskSnapshot* out) {
  out->set_state(task.state);
  out->set_epoch(task.epoch);
  out->set_attempt(task.attempt);
  out->set_worker(task.worker);
  out->set_incarnation(task.incarnation);
  out->set_resolved(task.resolved);
  out->set_digest(task.digest);
  out->set_unresolvable(task.unresolvable);
  if (task.output.ByteSizeLong() > 0) *out->mutable_output() = task.output;
  for (const v1::Measurement& measurement : task.measurements) *out->add_measurements() = measurement;
  if (task.error.ByteSizeLong() > 0) *out->mutable_error() = task.error;
  out->set_seconds(task.seconds);
  out->set_peak_memory_bytes(task.peak_memory_bytes);
  if (task.checkpoint.ByteSizeLong() > 0) *out->mutable_checkpoint() = task.checkpoint;
  out->set_checkpoint_step(task.checkpoint_step);
  out->set_reported_epoch(task.reported_epoch);
  out->set_infra_failures(task.infra_failures);
  out->set_node_failures(task.node_failures);
  out->set_resource_failures(task.resource_failures);
  out->set_crashes(task.crashes);
  for (const std::string& worker : task.avoid) out->add_avoid(worker);
  out->set_losses(task.losses);
  if (!task.gang.id().empty()) *out->mutable_gang() = task.gang;
}

// All but `spec` and `unmet_needs`, which follow from the rest.
void Get(v1::TaskSnapshot& in, TaskState* task) {
  task->state = in.state();
  task->epoch = in.epoch();
  task->attempt = in.attempt();
  task->worker = in.worker();
  task->incarnation = in.incarnation();
  task->resolved = in.resolved();
  task->digest = in.digest();
  task->unresolvable = in.unresolvable();
  task->output.Swap(in.mutable_output());
  task->measurements.assign(in.measurements().begin(), in.measurements().end());
  task->error.Swap(in.mutable_error());
  task->seconds = in.seconds();
  task->peak_memory_bytes = in.peak_memory_bytes();
  task->checkpoint.Swap(in.mutable_checkpoint());
  task->checkpoint_step = in.checkpoint_step();
  task->reported_epoch = in.reported_epoch();
  task->infra_failures = in.infra_failures();
  task->node_failures = in.node_failures();
  task->resource_failures = in.resource_failures();
  task->crashes = in.crashes();
  task->avoid.insert(in.avoid().begin(), in.avoid().end());
  task->losses = in.losses();
  task->gang.Swap(in.mutable_gang());
}

void Put(const JobState& job, v1::JobSnapshot* out) {
  out->set_id(job.id);
  out->set_created_seq(job.created_seq);
  out->set_last_seq(job.last_seq);
  out->set_state(job.state);
  out->set_reason(job.reason);
  *out->mutable_created() = job.created;
  out->set_create_time_ms(job.create_time_ms);
  out->set_end_time_ms(job.end_time_ms);
  for (const TaskState& task : job.tasks) Put(task, out->add_tasks());
  for (const v1::Trial& trial : job.trials) *out->add_trials() = trial;
  out->set_study_finished(job.study_finished);
  for (const auto& [selector, key] : job.best) {
    v1::StudyFinished::Best* best = out->add_best();
    best->set_selector(selector);
    best->set_trial(key.first);
    best->set_replicate(key.second);
  }
  for (const v1::Event& note : job.notes) *out->add_notes() = note;
  *out->mutable_artifact() = job.artifact;
  *out->mutable_report() = job.report;
  *out->mutable_best_artifact() = job.best_artifact;
  out->set_dead(job.dead);
  out->set_paused_time_ms(job.paused_time_ms);
  out->set_paused_ms(job.paused_ms);
  out->set_device_seconds(job.device_seconds);
  out->set_attempts(job.attempts);
  out->set_retries(job.retries);
  out->set_exhausted(job.exhausted);
  for (const std::string& worker : job.workers) out->add_workers(worker);
}

void GetPlain(v1::JobSnapshot& in, JobState* job) {
  job->id = in.id();
  job->created_seq = in.created_seq();
  job->last_seq = in.last_seq();
  job->state = in.state();
  job->reason = in.reason();
  job->created.Swap(in.mutable_created());
  job->create_time_ms = in.create_time_ms();
  job->end_time_ms = in.end_time_ms();
  job->trials.assign(in.trials().begin(), in.trials().end());
  job->study_finished = in.study_finished();
  for (const v1::StudyFinished::Best& best : in.best()) job->best[best.selector()] = {best.trial(), best.replicate()};
  job->notes.assign(in.notes().begin(), in.notes().end());
  job->artifact = in.artifact();
  job->report = in.report();
  job->best_artifact = in.best_artifact();
  job->dead = in.dead();
  job->paused_time_ms = in.paused_time_ms();
  job->paused_ms = in.paused_ms();
  job->device_seconds = in.device_seconds();
  job->attempts = in.attempts();
  job->retries = in.retries();
  job->exhausted = in.exhausted();
  job->workers.insert(in.workers().begin(), in.workers().end());
}

// Whether what needs `i` may go on: it is done, or it is a trial that the study gave up.
bool IsMet(const JobState& job, size_t i) {
  const v1::Task::State state = job.tasks[i].state;
  if (state == v1::Task::DONE || state == v1::Task::CACHED) return true;
  return state == v1::Task::CANCELLED && job.study_finished && job.plan.tasks[i].kind == v1::TRAIN && job.tasks[i].losses == 0;
}

Status Get(v1::JobSnapshot& in, State& state, JobState& job, const std::string& code_version) {
  GetPlain(in, &job);
  RF_RETURN_IF_ERROR(Annotate(Applier::Plan(job, code_version), Join("job ", job.id)));
  if (static_cast<size_t>(in.tasks_size()) != job.tasks.size()) {
    return DataLoss("job ", job.id, " has ", in.tasks_size(), " tasks in the snapshot and ", job.tasks.size(), " in its plan");
  }
  for (const auto& [selector, best] : job.best) {
    if (!job.train_tasks.contains({best.first, best.second})) return DataLoss("job ", job.id, ": the best of the study is not in the plan");
  }
  if (job.dead >= static_cast<int>(job.tasks.size())) return DataLoss("job ", job.id, " has no task ", job.dead);
  for (size_t i = 0; i < job.tasks.size(); ++i) Get(*in.mutable_tasks(static_cast<int>(i)), &job.tasks[i]);
  for (size_t i = 0; i < job.tasks.size(); ++i) {
    TaskState& task = job.tasks[i];
    const plan::PlannedTask& planned = job.plan.tasks[i];
    if (planned.kind == v1::TRAIN && task.resolved && static_cast<size_t>(planned.trial) >= job.trials.size()) {
      return DataLoss("job ", job.id, ": ", planned.path, " has no trial in the snapshot");
    }
    const std::string unresolvable = task.unresolvable;
    if (task.resolved) Applier::Resolve(job, i);
    task.unresolvable = unresolvable;
    if (IsMet(job, i)) {
      for (const size_t dependent : job.dependents[i]) --job.tasks[dependent].unmet_needs;
    }
    job.settled += IsSettled(task.state);
    if (task.state == v1::Task::READY) {
      job.ready[planned.kind].insert(i);
      job.fresh.push_back(i);
    }
    if (task.state != v1::Task::LEASED) continue;
    job.leased.insert(i);
    Applier::IndexLease(state, job, i, true);
  }
  return absl::OkStatus();
}

}  // namespace

std::string TakeSnapshot(const State& state) {
  v1::Snapshot snapshot;
  snapshot.set_version(kSnapshotVersion);
  snapshot.set_last_seq(state.last_seq);
  for (const std::string& id : state.order) Put(state.jobs.at(id), snapshot.add_jobs());
  std::vector<const std::pair<const std::string, CachedResult>*> results;
  results.reserve(state.results.size());
  for (const auto& entry : state.results) results.push_back(&entry);
  std::sort(results.begin(), results.end(), [](const auto* a, const auto* b) { return a->first < b->first; });
  for (const auto* entry : results) {
    v1::ResultSnapshot* out = snapshot.add_results();
    out->set_task_digest(entry->first);
    *out->mutable_output() = entry->second.output;
    for (const v1::Measurement& measurement : entry->second.measurements) *out->add_measurements() = measurement;
  }
  for (const auto& [name, policy] : state.tenants) *snapshot.add_tenants() = policy;
  for (const std::string& key : state.answered.order()) {
    const AnsweredRequests::Entry& entry = *state.answered.Find(key);
    v1::RequestSnapshot* out = snapshot.add_requests();
    out->set_key(key);
    out->set_digest(entry.digest);
    out->set_time_ms(entry.time_ms);
  }
  std::string bytes;
  {
    google::protobuf::io::StringOutputStream stream(&bytes);
    google::protobuf::io::CodedOutputStream coded(&stream);
    coded.SetSerializationDeterministic(true);  // map fields in one order
    RF_CHECK(snapshot.SerializeToCodedStream(&coded));
  }
  return bytes;
}

StatusOr<State> ReadSnapshot(std::string_view bytes, const std::string& code_version) {
  v1::Snapshot snapshot;
  if (!snapshot.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) return DataLoss("the snapshot is damaged");
  if (snapshot.version() == 0 || snapshot.version() > kSnapshotVersion) {
    return DataLoss("the snapshot has version ", snapshot.version(), ", this refineryd knows up to ", kSnapshotVersion,
                    "; start the version that wrote it");
  }
  State state;
  state.last_seq = snapshot.last_seq();
  for (v1::JobSnapshot& in : *snapshot.mutable_jobs()) {
    const auto [it, is_new] = state.jobs.try_emplace(in.id());
    if (!is_new) return DataLoss("the snapshot has job ", in.id(), " twice");
    JobState& job = it->second;
    RF_RETURN_IF_ERROR(Get(in, state, job, code_version));
    state.order.push_back(job.id);
    if (!job.created.request_id().empty()) state.requests[job.created.request_id()] = job.id;
    Applier::Index(state, job);
  }
  state.results.reserve(snapshot.results_size());
  for (v1::ResultSnapshot& in : *snapshot.mutable_results()) {
    CachedResult& result = state.results[in.task_digest()];
    result.output.Swap(in.mutable_output());
    result.measurements.assign(in.measurements().begin(), in.measurements().end());
  }
  for (const v1::TenantPolicy& policy : snapshot.tenants()) state.tenants[policy.tenant()] = policy;
  for (const v1::RequestSnapshot& in : snapshot.requests()) state.answered.Add(in.key(), in.digest(), in.time_ms());
  return state;
}

}  // namespace refinery::jobs
