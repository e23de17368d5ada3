#include "client/render/why_text.h"

#include <algorithm>
#include <map>

#include "client/render/job_text.h"
#include "client/render/terminal.h"
#include "common/status.h"

namespace refinery::client {
namespace {

constexpr double kStragglerFactor = 2;
constexpr double kStragglerSeconds = 30;
constexpr size_t kMaxCauses = 5;
constexpr size_t kMaxValue = 60;

// What the events tell of each task and of the job.
struct History {
  std::map<std::string, int64_t> done_ms;      // task -> when it was done
  std::map<std::string, int64_t> leased_ms;    // task -> last grant
  std::map<std::string, int64_t> returned_ms;  // task -> when its last attempt ended without a result
  std::map<std::string, int> failures;         // class -> attempts
  int expired = 0, released = 0, attempts = 0;
  int64_t resumed_ms = 0;
};

History ReadEvents(const std::vector<v1::Event>& events) {
  History history;
  for (const v1::Event& event : events) {
    switch (event.kind_case()) {
      case v1::Event::kTaskLeased:
        history.leased_ms[event.task_leased().path()] = event.time_ms();
        ++history.attempts;
        break;
      case v1::Event::kTaskFinished:
        history.done_ms[event.task_finished().path()] = event.time_ms();
        break;
      case v1::Event::kTaskFailed:
        history.returned_ms[event.task_failed().path()] = event.time_ms();
        ++history.failures[v1::FailureClass_Name(event.task_failed().error().failure_class())];
        break;
      case v1::Event::kLeaseExpired:
        history.returned_ms[event.lease_expired().path()] = event.time_ms();
        ++history.expired;
        break;
      case v1::Event::kLeaseReleased:
        history.returned_ms[event.lease_released().path()] = event.time_ms();
        ++history.released;
        break;
      case v1::Event::kJobResumed:
      case v1::Event::kJobRetried:
        history.resumed_ms = event.time_ms();
        break;
      default:
        break;
    }
  }
  return history;
}

std::string Plural(size_t count, const std::string& what) { return Join(count, " ", what, count == 1 ? "" : "s"); }

// Since when a READY task could have run.
int64_t ReadySince(const v1::Job& job, const v1::Task& task, const History& history) {
  int64_t since = std::max(job.create_time_ms(), history.resumed_ms);
  for (const std::string& need : task.needs()) {
    if (const auto done = history.done_ms.find(need); done != history.done_ms.end()) since = std::max(since, done->second);
  }
  if (const auto returned = history.returned_ms.find(task.path()); returned != history.returned_ms.end()) {
    since = std::max(since, returned->second);
  }
  return since;
}

std::string WaitingText(const v1::Job& job, const History& history, int64_t now_ms) {
  const v1::Task* longest = nullptr;
  int64_t since = 0;
  std::map<std::string, size_t> reasons;
  size_t waiting = 0;
  for (const v1::Task& task : job.tasks()) {
    if (task.state() != v1::Task::READY) continue;
    ++waiting;
    ++reasons[task.reason_code().empty() ? "WAITING" : task.reason_code()];
    const int64_t ready = ReadySince(job, task, history);
    if (longest == nullptr || ready < since) {
      longest = &task;
      since = ready;
    }
  }
  if (longest == nullptr) return "";
  std::string text = Join(" ", Plural(waiting, "task"), waiting == 1 ? " is" : " are", " ready and ",
                          waiting == 1 ? "waits" : "wait", " (");
  bool first = true;
  for (const auto& [reason, count] : reasons) {
    text += Join(first ? "" : ", ", count, " ", reason);
    first = false;
  }
  text += Join("); longest ", longest->path(), ", for ", DurationText(static_cast<double>(now_ms - since) / 1000));
  if (!longest->why().empty()) text += Join(": ", longest->why());
  return text + ".";
}

double MedianSeconds(const v1::Job& job, v1::TaskKind kind) {
  std::vector<double> seconds;
  for (const v1::Task& task : job.tasks()) {
    if (task.kind() == kind && task.state() == v1::Task::DONE) seconds.push_back(task.seconds());
  }
  if (seconds.empty()) return 0;
  std::ranges::sort(seconds);
  return seconds[seconds.size() / 2];
}

std::string RunningText(const v1::Job& job, const History& history, int64_t now_ms) {
  std::string text;
  size_t running = 0;
  const v1::Task* straggler = nullptr;
  double longest = 0, its_median = 0;
  for (const v1::Task& task : job.tasks()) {
    if (task.state() != v1::Task::LEASED) continue;
    ++running;
    const auto leased = history.leased_ms.find(task.path());
    const double seconds = leased == history.leased_ms.end() ? 0 : static_cast<double>(now_ms - leased->second) / 1000;
    if (seconds < longest) continue;
    longest = seconds;
    straggler = &task;
    its_median = MedianSeconds(job, task.kind());
  }
  if (straggler == nullptr) return text;
  text = Join(" ", Plural(running, "task"), running == 1 ? " runs" : " run", "; longest ", straggler->path(), " (attempt ",
              straggler->attempt(), " on ", straggler->worker(), "), for ", DurationText(longest));
  const v1::TaskProgress& progress = straggler->progress();
  if (!progress.phase().empty()) text += Join(", ", progress.phase());
  if (progress.total() > 0) text += Join(" ", static_cast<int>(100 * progress.done() / progress.total()), " % done");
  if (its_median > 0 && longest > kStragglerFactor * its_median && longest > kStragglerSeconds) {
    text += Join(": a straggler, for tasks of its kind took ", DurationText(its_median), " (median)");
  }
  return text + ".";
}

std::string FailuresText(const v1::Job& job, const History& history) {
  size_t failed = 0;
  std::string classes;
  for (const auto& [name, count] : history.failures) {
    failed += static_cast<size_t>(count);
    classes += Join(classes.empty() ? "" : ", ", count, " ", name);
  }
  std::string text;
  if (failed > 0) text += Join(" Of ", Plural(static_cast<size_t>(history.attempts), "attempt"), " ", failed, " failed (", classes, ").");
  if (history.expired > 0) text += Join(" ", Plural(static_cast<size_t>(history.expired), "lease"), " ran out because a worker was silent.");
  if (history.released > 0) text += Join(" ", Plural(static_cast<size_t>(history.released), "attempt"), " made way for other work.");
  for (const v1::Task& task : job.tasks()) {
    if (task.error().message().empty() || task.state() == v1::Task::DONE || task.state() == v1::Task::CACHED) continue;
    text += Join(" Last error, of ", task.path(), " (attempt ", task.attempt(), ", ",
                 v1::FailureClass_Name(task.error().failure_class()), "): ", task.error().message(),
                 task.error().message().ends_with('.') ? "" : ".");
    if (task.state() == v1::Task::DEAD) break;  // this one ended the job
  }
  return text;
}

std::string NextStep(const v1::Job& job, size_t live_workers) {
  switch (job.state()) {
    case v1::Job::FAILED:
      return Join(" See `refinery logs ", job.id(), "`; when the cause is gone, `refinery retry ", job.id(), "`.");
    case v1::Job::PAUSED:
      return Join(" `refinery resume ", job.id(), "` lets it go on.");
    case v1::Job::PENDING:
    case v1::Job::RUNNING:
      if (live_workers == 0) return " No worker is there: start refinery-worker with this coordinator's address.";
      return "";
    default:
      return "";
  }
}

std::string Short(const std::string& text) {
  if (text.empty()) return "nothing";
  return text.size() <= kMaxValue ? text : text.substr(0, kMaxValue - 3) + "...";
}

std::string CauseText(const v1::JobDiff::Cause& cause) {
  if (cause.field().starts_with("inputs.")) {
    return Join(cause.field(), " has other bytes", cause.because_of().empty() ? "" : Join(" (from ", cause.because_of(), ")"));
  }
  return Join(cause.field(), " ", Short(cause.before()), " -> ", Short(cause.after()));
}

std::string ChangeText(const v1::JobDiff::TaskDiff& task) {
  using Diff = v1::JobDiff::TaskDiff;
  switch (task.change()) {
    case Diff::RAN_AGAIN: return "nothing changed, yet its earlier result could not be used";
    case Diff::ADDED: return "new";
    case Diff::REMOVED: return "gone";
    case Diff::CHANGED: {
      std::string text;
      const int shown = std::min<int>(task.causes_size(), kMaxCauses);
      for (int i = 0; i < shown; ++i) text += Join(i ? "; " : "", CauseText(task.causes(i)));
      if (task.causes_size() > shown) text += Join("; and ", task.causes_size() - shown, " more");
      return text;
    }
    default: return "";
  }
}

}  // namespace

std::string WhyText(const v1::Job& job, const std::vector<v1::Event>& events, const v1::ListWorkersResponse& workers, int64_t now_ms) {
  const History history = ReadEvents(events);
  const int64_t end_ms = job.end_time_ms() > 0 ? job.end_time_ms() : now_ms;
  size_t cached = 0, live = 0;
  for (const v1::Task& task : job.tasks()) cached += task.state() == v1::Task::CACHED;
  for (const v1::WorkerInfo& worker : workers.workers()) live += worker.state() != "lost";
  std::string text = Join("Job ", job.id(), " is ", StateName(job.state()), job.end_time_ms() > 0 ? " after " : ", created ",
                          DurationText(static_cast<double>(end_ms - job.create_time_ms()) / 1000),
                          job.end_time_ms() > 0 ? "" : " ago", job.reason().empty() ? "" : Join(" (", job.reason(), ")"),
                          ", priority ", job.priority(), ", tenant ", job.tenant().empty() ? "default" : job.tenant(), ": ",
                          job.tasks_done(), " of ", job.tasks_total(), " tasks are done");
  if (cached > 0) text += Join(", ", cached, " of them out of the cache");
  text += ".";
  if (!IsFinal(job.state())) {
    text += RunningText(job, history, now_ms);
    text += WaitingText(job, history, now_ms);
    text += Join(" ", Plural(live, "worker"), live == 1 ? " lives." : " live.");
  }
  text += FailuresText(job, history);
  text += NextStep(job, live);
  return text + "\n";
}

std::string DiffText(const v1::JobDiff& diff) {
  using Diff = v1::JobDiff::TaskDiff;
  std::map<Diff::Change, size_t> counts;
  double seconds = 0;
  std::string lines;
  for (const Diff& task : diff.tasks()) {
    ++counts[task.change()];
    seconds += task.seconds();
    if (const std::string change = ChangeText(task); !change.empty()) {
      lines += Join("  ", task.path(), task.seconds() > 0 ? Join(" (", DurationText(task.seconds()), ")") : "", ": ", change, "\n");
    }
  }
  std::string text = Join(diff.after(), " compared with ", diff.before(), ": ", Plural(static_cast<size_t>(diff.tasks_size()), "task"));
  const std::pair<Diff::Change, const char*> kinds[] = {{Diff::SAME, "out of the cache"}, {Diff::CHANGED, "changed"},
                                                        {Diff::RAN_AGAIN, "ran again unchanged"}, {Diff::ADDED, "new"},
                                                        {Diff::REMOVED, "gone"}, {Diff::NOT_REACHED, "not reached"}};
  for (const auto& [change, words] : kinds) {
    if (counts[change] > 0) text += Join(", ", counts[change], " ", words);
  }
  return Join(text, "; ", DurationText(seconds), " of work.\n", lines);
}

}  // namespace refinery::client
