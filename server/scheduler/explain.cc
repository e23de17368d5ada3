// Why a task does not run.

#include <algorithm>

#include "server/scheduler/match.h"
#include "server/scheduler/schedule.h"

namespace refinery::scheduler {
namespace {

using jobs::JobState;
using jobs::TaskState;

Wait ExplainBlocked(const JobState& job, size_t i) {
  const plan::PlannedTask& planned = job.plan.tasks[i];
  size_t open = 0;
  std::string first;
  for (const std::string& need : planned.needs) {
    const TaskState* other = job.Find(need);
    if (other == nullptr || other->state == v1::Task::DONE || other->state == v1::Task::CACHED) continue;
    if (open++ == 0) first = need;
  }
  if (open > 0) {
    return {v1::WAIT_DEPENDENCIES, Join("waits for ", open, open == 1 ? " task" : " tasks", ", the first is ", first)};
  }
  if (planned.kind == v1::TRAIN) {
    return {v1::WAIT_SEARCH, Join("waits for the search to suggest trial ", planned.trial, " after the ", job.trials.size(),
                                  " so far")};
  }
  return {v1::WAIT_SEARCH, "waits for the best trial"};
}

// Tasks before it in the queues, by priority; a rough figure, for people.
size_t Ahead(const jobs::State& state, const JobState& job) {
  size_t ahead = 0;
  for (const auto& [priority, tenants] : state.queues) {
    if (priority <= job.priority()) break;
    for (const auto& [tenant, keys] : tenants) {
      for (const auto& [seq, id] : keys) {
        for (const auto& [kind, tasks] : state.jobs.at(id).ready) ahead += tasks.size();
      }
    }
  }
  return ahead;
}

Wait ExplainQuota(const jobs::State& state, const JobState& job, const v1::Requirements& needs) {
  const auto policy = state.tenants.find(job.tenant());
  if (policy == state.tenants.end()) return {};
  const Usage used = UsageOf(state)[job.tenant()];
  if (policy->second.max_leases() > 0 && used.leases >= policy->second.max_leases()) {
    return {v1::WAIT_QUOTA, Join("tenant ", job.tenant(), " runs ", used.leases, " of the ", policy->second.max_leases(),
                                 " tasks that it may run at once")};
  }
  if (policy->second.max_devices() > 0 && used.devices + needs.devices() > policy->second.max_devices()) {
    return {v1::WAIT_QUOTA, Join("tenant ", job.tenant(), " uses ", used.devices, " of its ", policy->second.max_devices(),
                                 " devices and the task needs ", needs.devices())};
  }
  return {};
}

// Whether the gang is larger than all workers together; else no reason.
Wait ExplainGang(const jobs::State& state, const JobState& job, size_t i, const std::vector<Worker>& workers, size_t fit) {
  const v1::TaskKind kind = job.plan.tasks[i].kind;
  const v1::Requirements& needs = job.RequirementsOf(kind);
  if (needs.gang() <= 1) return {};
  const auto ready = job.ready.find(kind);
  const size_t wanted = std::min<size_t>(needs.gang(), ready == job.ready.end() ? 1 : ready->second.size());
  const uint64_t room = RoomFor(state, workers, needs);
  if (room >= wanted) return {};
  return {v1::WAIT_GANG, Join("its gang of ", wanted, " is larger than the fleet: the ", fit,
                              fit == 1 ? " worker that could take it has" : " workers that could take it have", " room for ", room,
                              " of them at once; start more workers, or set a smaller requirements.gang in its policy")};
}

Wait ExplainWorkers(const jobs::State& state, const JobState& job, size_t i, const std::vector<Worker>& workers) {
  const TaskState& task = job.tasks[i];
  const v1::Requirements& needs = job.RequirementsOf(job.plan.tasks[i].kind);
  size_t fit = 0, free = 0, avoided = 0, slots = 0;
  std::vector<const v1::WorkerInfo*> infos;
  for (const Worker& worker : workers) {
    if (!worker.draining) infos.push_back(worker.info);
    if (worker.draining || !CanEver(worker.info, needs)) continue;
    ++fit;
    if (worker.free_slots == 0) continue;
    slots += worker.free_slots;
    ++free;
    avoided += task.avoid.contains(std::string(worker.id));
  }
  if (workers.empty()) return {v1::WAIT_NO_WORKER, "no worker is connected"};
  if (fit == 0) {
    if (infos.empty()) return {v1::WAIT_NO_WORKER, Join("every worker drains, all ", workers.size(), " of them")};
    return {v1::WAIT_NO_MATCH, Join("it needs ", Describe(needs), ", which ",
                                    infos.size() == 1 ? "the one worker has not" : Join("none of the ", infos.size(), " workers has"),
                                    ": ", WhyNone(infos, needs))};
  }
  if (Wait gang = ExplainGang(state, job, i, workers, fit); gang.reason != v1::WAIT_REASON_UNSPECIFIED) return gang;
  if (free == 0) {
    return {v1::WAIT_NO_FREE_WORKER, Join(fit == 1 ? "the one worker" : Join("all ", fit, " workers"), " that could take it ",
                                          fit == 1 ? "is" : "are", " busy; ", state.leases.size(), " tasks run")};
  }
  if (free == avoided) {
    return {v1::WAIT_AVOIDED, Join("it failed on the ", free, " workers that are free, so it waits for another one of ", fit)};
  }
  if (needs.gang() > 1 && slots < needs.gang()) {
    return {v1::WAIT_GANG, Join("its gang of ", needs.gang(), " does not fit into the ", slots, " free slots")};
  }
  if (const size_t ahead = Ahead(state, job); ahead > 0) {
    return {v1::WAIT_PRIORITY, Join(ahead, " tasks of higher priority come first")};
  }
  return {v1::WAIT_NO_FREE_WORKER, Join("it is next, or the devices of the ", fit, " workers that could take it are in use")};
}

}  // namespace

Wait Explain(const jobs::Core& core, const JobState& job, size_t i, const std::vector<Worker>& workers, const jobs::Now& now) {
  const jobs::State& state = core.state();
  const TaskState& task = job.tasks[i];
  if (task.state != v1::Task::BLOCKED && task.state != v1::Task::READY) return {};
  if (job.state == v1::Job::PAUSED) return {v1::WAIT_PAUSED, Join("its job is paused: ", job.reason)};
  if (task.state == v1::Task::BLOCKED) return ExplainBlocked(job, i);
  if (task.not_before > now.steady) {
    return {v1::WAIT_BACKOFF, Join("tried again in ", (task.not_before - now.steady).count(), " ms after: ", task.error.message())};
  }
  if (state.running.contains(task.digest)) return {v1::WAIT_IDENTICAL, "an identical task runs; its result will do for both"};
  const v1::Requirements& needs = job.RequirementsOf(job.plan.tasks[i].kind);
  if (Wait quota = ExplainQuota(state, job, needs); quota.reason != v1::WAIT_REASON_UNSPECIFIED) return quota;
  return ExplainWorkers(state, job, i, workers);
}

}  // namespace refinery::scheduler
