// The part of the core that is about artifacts the store has lost: what made them runs again.

#include <algorithm>

#include "server/jobs/core.h"
#include "server/jobs/retry.h"
#include "server/jobs/text.h"

namespace refinery::jobs {
namespace {

bool IsDone(const TaskState& task) { return task.state == v1::Task::DONE || task.state == v1::Task::CACHED; }

}  // namespace

void Core::EmitLost(const JobState& job, size_t i, bool checkpoint, const Now& now, Events* events) {
  const TaskState& task = job.tasks[i];
  v1::Event event;
  v1::ArtifactLost* lost = event.mutable_artifact_lost();
  lost->set_path(job.plan.tasks[i].path);
  lost->set_digest(checkpoint ? task.checkpoint.digest() : task.output.digest());
  lost->set_checkpoint(checkpoint);
  Emit(job.id, std::move(event), now, events);
}

// The task that made input `k` of task `i`; -1 for a file.
int Core::MakerOf(const JobState& job, size_t i, size_t k) {
  const plan::Input& input = job.plan.tasks[i].inputs[k];
  switch (input.source) {
    case plan::Input::Source::kTask: return static_cast<int>(job.index.at(input.from));
    case plan::Input::Source::kStudyBest: {
      const auto best = job.best.find(input.from);
      if (best == job.best.end()) return -1;
      return static_cast<int>(job.train_tasks.at({best->second.first, best->second.second}));
    }
    default: return -1;
  }
}

bool Core::ComesAgain(JobState& job, size_t i, size_t k, const std::string& digest, const Now& now, Events* events) {
  const int maker = MakerOf(job, i, k);
  if (maker < 0) return false;
  const TaskState& task = job.tasks[maker];
  if (!IsSettled(task.state)) return true;  // it runs again already
  if (!IsDone(task)) return false;
  if (task.output.digest() != digest) return !task.output.digest().empty();  // it has run again, with another result
  if (task.losses >= kMaxLosses) return false;
  Reopen(job, static_cast<size_t>(maker), now, events);
  return true;
}

void Core::Reopen(JobState& job, size_t i, const Now& now, Events* events) {
  const v1::TaskSpec spec = job.tasks[i].spec;
  EmitLost(job, i, false, now, events);
  job.tasks[i].not_before = now.steady;
  // What it needs itself may be gone as well; then it need not run in vain first.
  for (int k = 0; k < spec.inputs_size(); ++k) {
    const std::string& digest = spec.inputs(k).digest();
    if (!options_.is_complete(digest)) (void)ComesAgain(job, i, static_cast<size_t>(k), digest, now, events);
  }
}

bool Core::TakeLosses(JobState& job, size_t i, v1::TaskError* error, const Now& now, Events* events) {
  const bool around_the_task = error->failure_class() == v1::INFRA || error->failure_class() == v1::NODE;
  if (!around_the_task || job.state == v1::Job::CANCELLING || options_.mutations.ignore_losses) return false;
  TaskState& task = job.tasks[i];
  if (!task.checkpoint.digest().empty() && !options_.is_complete(task.checkpoint.digest())) EmitLost(job, i, true, now, events);
  std::string waits_for;
  bool waits = task.unmet_needs > 0;  // another attempt has found the loss before
  const v1::TaskSpec spec = task.spec;
  for (int k = 0; k < spec.inputs_size(); ++k) {
    const v1::ArtifactRef& input = spec.inputs(k);
    if (options_.is_complete(input.digest())) continue;
    if (ComesAgain(job, i, static_cast<size_t>(k), input.digest(), now, events)) {
      waits = true;
      waits_for = Join(" '", input.name(), "'");
      continue;
    }
    error->set_failure_class(v1::USER);
    error->set_message(Cut(Join("input '", input.name(), "' (", input.digest(), ") is not in the store any more",
                                MakerOf(job, i, static_cast<size_t>(k)) < 0
                                    ? "; upload it again and retry the job"
                                    : Join(", and what makes it has run again ", kMaxLosses,
                                           " times already; look at the coordinator's disk"))));
    return false;
  }
  if (!waits) return false;
  task.release_reason = Join("its input", waits_for, " was lost and is made again");
  EmitReleased(job, i, now, events);
  return true;
}

void Core::OnLost(const std::vector<std::string>& artifacts, const Now& now, Events* events) {
  if (artifacts.empty() || !read_only_.ok()) return;  // the next pass finds them again
  const std::set<std::string> lost(artifacts.begin(), artifacts.end());
  const std::set<JobKey> active = state_.active;
  for (const auto& [seq, id] : active) {
    JobState& job = Job(id);
    if (job.state == v1::Job::CANCELLING || options_.mutations.ignore_losses) continue;
    for (size_t i = 0; i < job.tasks.size(); ++i) {
      const TaskState& task = job.tasks[i];
      if (!IsDone(task) || task.losses >= kMaxLosses || !lost.contains(task.output.digest())) continue;
      const bool wanted = job.plan.tasks[i].kind == v1::EXPORT ||
                          std::any_of(job.dependents[i].begin(), job.dependents[i].end(),
                                      [&](size_t other) { return !IsSettled(job.tasks[other].state); });
      if (wanted && !options_.is_complete(task.output.digest())) Reopen(job, i, now, events);
    }
    Advance(id, now, events);
  }
}

}  // namespace refinery::jobs
