// The state as others see it: the API's Job, and a canonical text for comparisons.

#include <cctype>

#include "server/jobs/state.h"

namespace refinery::jobs {
namespace {

constexpr size_t kMaxNamedNeeds = 3;

// What a task that does not run yet waits for.
std::string Why(const JobState& job, size_t i, const Now& now) {
  const TaskState& task = job.tasks[i];
  const plan::PlannedTask& planned = job.plan.tasks[i];
  if (task.state == v1::Task::READY) {
    if (task.not_before > now.steady) {
      return Join("tried again in ", (task.not_before - now.steady).count(), " ms after: ", task.error.message());
    }
    return "waits for a free worker";
  }
  if (task.state != v1::Task::BLOCKED) return "";
  std::string names;
  size_t open = 0;
  for (const std::string& need : planned.needs) {
    const TaskState* other = job.Find(need);
    if (other == nullptr || other->state == v1::Task::DONE || other->state == v1::Task::CACHED) continue;
    if (open++ < kMaxNamedNeeds) names += Join(names.empty() ? "" : ", ", need);
  }
  if (open > kMaxNamedNeeds) names += Join(" and ", open - kMaxNamedNeeds, " more");
  if (open > 0) return "waits for " + names;
  if (planned.kind == v1::TRAIN) return Join("waits for the search to suggest trial ", planned.trial);
  return "waits for the best trial";
}

bool IsListed(const JobState& job, size_t i) {
  const auto tasks = job.ready.find(job.plan.tasks[i].kind);
  return tasks != job.ready.end() && tasks->second.contains(i);
}

v1::Task TaskToProto(const JobState& job, size_t i, const Now& now) {
  const TaskState& task = job.tasks[i];
  const plan::PlannedTask& planned = job.plan.tasks[i];
  v1::Task proto;
  proto.set_path(planned.path);
  proto.set_kind(planned.kind);
  proto.set_state(task.state);
  proto.set_attempt(task.attempt);
  proto.set_worker(task.worker);
  if (task.state == v1::Task::LEASED) *proto.mutable_progress() = task.progress;
  for (const v1::Measurement& measurement : task.measurements) *proto.add_measurements() = measurement;
  if (!task.output.digest().empty()) *proto.mutable_output() = task.output;
  if (task.error.failure_class() != v1::FAILURE_CLASS_UNSPECIFIED) *proto.mutable_error() = task.error;
  proto.set_seconds(task.seconds);
  proto.set_peak_memory_bytes(task.peak_memory_bytes);
  for (const std::string& need : planned.needs) proto.add_needs(need);
  proto.set_why(Why(job, i, now));
  proto.set_losses(task.losses);
  return proto;
}

}  // namespace

std::string KindName(v1::TaskKind kind) {
  std::string name = v1::TaskKind_Name(kind);
  for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return name;
}

v1::Job ToProto(const JobState& job, bool with_tasks, const Now& now) {
  v1::Job proto;
  proto.set_id(job.id);
  proto.set_state(job.state);
  proto.set_reason(job.reason);
  *proto.mutable_recipe() = job.created.recipe();
  proto.set_create_time_ms(job.create_time_ms);
  proto.set_end_time_ms(job.end_time_ms);
  if (!job.artifact.digest().empty()) *proto.mutable_artifact() = job.artifact;
  if (!job.report.digest().empty()) *proto.mutable_report() = job.report;
  if (!job.best_artifact.digest().empty()) *proto.mutable_best() = job.best_artifact;
  proto.set_as_of_seq(job.last_seq);
  proto.set_tasks_total(static_cast<uint32_t>(job.tasks.size()));
  uint32_t done = 0;
  for (const TaskState& task : job.tasks) done += task.state == v1::Task::DONE || task.state == v1::Task::CACHED;
  proto.set_tasks_done(done);
  if (!with_tasks) return proto;
  for (size_t i = 0; i < job.tasks.size(); ++i) *proto.add_tasks() = TaskToProto(job, i, now);
  for (const v1::Trial& trial : job.trials) *proto.add_trials() = trial;
  return proto;
}

std::string Dump(const State& state) {
  std::string out = Join("seq ", state.last_seq, "\n");
  for (const std::string& id : state.order) {
    const JobState& job = state.jobs.at(id);
    out += Join("job ", id, " ", v1::Job::State_Name(job.state), " seq ", job.created_seq, "-", job.last_seq, " settled ",
                job.settled, " dead ", job.dead, " attempts ", job.attempts, " retries ", job.retries, " device seconds ",
                job.device_seconds, " paused ", job.paused_time_ms, " ", job.paused_ms, " exhausted '", job.exhausted,
                "' study finished ", job.study_finished, " code ", job.created.code_version(), " policy {",
                job.created.policy().ShortDebugString(), "} reason '", job.reason, "' times ", job.create_time_ms, " ",
                job.end_time_ms, "\n  artifact ", job.artifact.ShortDebugString(), " report ",
                job.report.ShortDebugString(), " best ", job.best_artifact.ShortDebugString(), "\n");
    for (const std::string& worker : job.workers) out += Join("  worker ", worker, "\n");
    for (size_t i = 0; i < job.tasks.size(); ++i) {
      const TaskState& task = job.tasks[i];
      out += Join("  task ", job.plan.tasks[i].path, " ", v1::Task::State_Name(task.state), " epoch ", task.epoch,
                  " attempt ", task.attempt, " worker ", task.worker, "/", task.incarnation, " digest ", task.digest,
                  " unmet ", task.unmet_needs, " reported ", task.reported_epoch, " failures ", task.infra_failures, " ",
                  task.node_failures, " ", task.resource_failures, " ", task.crashes, " ready ", IsListed(job, i),
                  " leased ", job.leased.contains(i), " ", state.leases.contains({id, i}), " resolved ", task.resolved, "\n    spec ", task.spec.ShortDebugString(), "\n    output ",
                  task.output.ShortDebugString(), " error ", task.error.ShortDebugString(), " checkpoint ",
                  task.checkpoint_step, " ", task.checkpoint.ShortDebugString(), " cost ", task.seconds, " ",
                  task.peak_memory_bytes, " unresolvable '", task.unresolvable, "'\n");
      if (task.losses > 0) out += Join("    losses ", task.losses, "\n");
      for (const v1::Measurement& measurement : task.measurements) out += Join("    ", measurement.ShortDebugString(), "\n");
      for (const std::string& worker : task.avoid) out += Join("    avoid ", worker, "\n");
    }
    for (const v1::Trial& trial : job.trials) out += Join("  trial ", trial.ShortDebugString(), "\n");
    for (const auto& [selector, key] : job.best) out += Join("  ", selector, " ", key.first, " ", key.second, "\n");
    for (const v1::Event& note : job.notes) out += Join("  note ", note.ShortDebugString(), "\n");
  }
  const std::map<std::string, CachedResult> results(state.results.begin(), state.results.end());
  for (const auto& [digest, result] : results) out += Join("result ", digest, " ", result.output.ShortDebugString(), "\n");
  const std::map<std::string, std::string> requests(state.requests.begin(), state.requests.end());
  for (const auto& [tenant, policy] : state.tenants) out += Join("tenant ", policy.ShortDebugString(), "\n");
  for (const auto& [seq, id] : state.active) out += Join("active ", seq, " ", id, "\n");
  for (const auto& [priority, tenants] : state.queues) {
    for (const auto& [tenant, jobs] : tenants) {
      for (const auto& [seq, id] : jobs) out += Join("queued ", priority, " ", tenant, " ", seq, " ", id, "\n");
    }
  }
  for (const auto& [request, job] : requests) out += Join("request ", request, " ", job, "\n");
  for (const std::string& key : state.answered.order()) {
    const AnsweredRequests::Entry& entry = *state.answered.Find(key);
    out += Join("answered ", key, " ", entry.digest, " ", entry.time_ms, "\n");
  }
  return out;
}

}  // namespace refinery::jobs
