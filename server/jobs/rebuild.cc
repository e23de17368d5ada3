// The part of the core that takes back what the log could not take.

#include <utility>

#include "server/jobs/core.h"

namespace refinery::jobs {
namespace {

// What only the running process knows of a task. Timers of an attempt mean nothing for another one.
void KeepVolatile(const TaskState& before, TaskState* task) {
  task->not_before = before.not_before;
  task->ready_since = before.ready_since;
  if (task->epoch != before.epoch) return;
  task->lease_deadline = before.lease_deadline;
  task->missing_since = before.missing_since;
  task->release_at = before.release_at;
  task->release_reason = before.release_reason;
  task->moved = before.moved;
  task->slowest_step = before.slowest_step;
  task->progress = before.progress;
  task->progress_version = before.progress_version;
}

}  // namespace

Status Core::Rebuild(const std::function<Status()>& replay) {
  const State before = std::exchange(state_, State());
  mark_.Clear();
  RF_RETURN_IF_ERROR(replay());
  for (auto& [id, job] : state_.jobs) {
    const auto old = before.jobs.find(id);
    if (IsTerminal(job.state) || old == before.jobs.end() || old->second.tasks.size() != job.tasks.size()) continue;
    const bool was_paused = old->second.state == v1::Job::PAUSED && job.state != v1::Job::PAUSED;
    for (size_t i = 0; i < job.tasks.size(); ++i) {
      KeepVolatile(old->second.tasks[i], &job.tasks[i]);
      if (!was_paused) continue;  // the pause is taken back, and with it that attempts end for it
      job.tasks[i].release_at = std::chrono::milliseconds(-1);
      job.tasks[i].release_reason.clear();
    }
  }
  next_scan_ = std::chrono::milliseconds(0);
  return absl::OkStatus();
}

}  // namespace refinery::jobs
