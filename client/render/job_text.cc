#include "client/render/job_text.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <map>

#include "client/exit_code.h"
#include "client/render/table.h"
#include "client/render/terminal.h"
#include "common/status.h"

namespace refinery::client {
namespace {

std::string LowerCase(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
  return text;
}

std::string Number(double value) {
  char text[40];
  std::snprintf(text, sizeof(text), "%.4g", value);
  return text;
}

std::string TimeText(int64_t time_ms) {
  if (time_ms == 0) return "-";
  std::time_t seconds = time_ms / 1000;
  std::tm local{};
  localtime_r(&seconds, &local);
  char text[40];
  std::strftime(text, sizeof(text), "%Y-%m-%d %H:%M:%S", &local);
  return text;
}

std::string MeasurementText(const v1::Measurement& measurement) {
  std::string text = Join(measurement.name(), " ", Number(measurement.value()));
  if (measurement.standard_error() > 0) text += Join(" ± ", Number(measurement.standard_error()));
  return text;
}

std::string FirstLine(const std::string& text) { return Printable(text.substr(0, text.find('\n'))); }

std::string TaskTable(const v1::Job& job) {
  std::vector<std::vector<std::string>> rows;
  for (const v1::Task& task : job.tasks()) {
    std::string remark;
    if (task.has_error()) remark = FirstLine(task.error().message());
    else if (task.state() == v1::Task::LEASED) remark = task.progress().phase();
    else if (!task.why().empty()) remark = task.why();
    else if (task.measurements_size() > 0) remark = MeasurementText(task.measurements(0));
    rows.push_back({task.path(), KindName(task.kind()), StateName(task.state()), Join(task.attempt()),
                    task.seconds() > 0 ? DurationText(task.seconds()) : "-",
                    task.peak_memory_bytes() > 0 ? SizeText(static_cast<double>(task.peak_memory_bytes())) : "-", remark});
  }
  return TableText({"TASK", "KIND", "STATE", "ATTEMPT", "TIME", "MEMORY", "REMARK"}, rows);
}

std::string TrialTable(const v1::Job& job) {
  std::vector<std::vector<std::string>> rows;
  for (const v1::Trial& trial : job.trials()) {
    bool done = trial.state() == v1::Trial::SUCCEEDED || trial.state() == v1::Trial::STOPPED_EARLY;
    rows.push_back({Join(trial.index()), LowerCase(v1::Trial::State_Name(trial.state())),
                    done ? Number(trial.mean()) : "-",
                    done && trial.standard_error() > 0 ? Number(trial.standard_error()) : "-", trial.origin(),
                    SettingsText(trial.settings())});
  }
  return TableText({"TRIAL", "STATE", "LOSS", "ERROR", "ORIGIN", "SETTINGS"}, rows);
}

// Seconds that a task which has not ended will still take.
double TaskSecondsLeft(const v1::Task& task, double usual) {
  if (task.state() != v1::Task::LEASED || task.progress().total() <= 0) return usual;
  double share = std::clamp(task.progress().done() / task.progress().total(), 0.0, 1.0);
  return usual * (1 - share);
}

}  // namespace

std::string StateName(v1::Job::State state) { return LowerCase(v1::Job::State_Name(state)); }
std::string StateName(v1::Task::State state) { return LowerCase(v1::Task::State_Name(state)); }
std::string KindName(v1::TaskKind kind) { return LowerCase(v1::TaskKind_Name(kind)); }

std::string SettingsText(const v1::TrialSettings& settings) {
  return Join(settings.optimizer(), ", learning rate ", Number(settings.learning_rate()), ", temperature ",
              Number(settings.temperature()), ", kl weight ", Number(settings.kl_weight()), ", rank ",
              settings.lora_rank());
}

std::string JobTable(const v1::ListJobsResponse& jobs) {
  std::vector<std::vector<std::string>> rows;
  for (const v1::Job& job : jobs.jobs()) {
    rows.push_back({job.id(), job.recipe().name(), StateName(job.state()),
                    Join(job.tasks_done(), "/", job.tasks_total()), Join(job.priority()), job.tenant(), TimeText(job.create_time_ms()),
                    FirstLine(job.reason())});
  }
  return TableText({"JOB", "RECIPE", "STATE", "TASKS", "PRIORITY", "TENANT", "CREATED", "REASON"}, rows);
}

namespace {

// "cpu,cuda:0 (NVIDIA H200, 139.8 GiB)"
std::string DevicesText(const v1::WorkerInfo& worker) {
  std::string text;
  for (const std::string& name : worker.devices()) {
    text += Join(text.empty() ? "" : ",", Printable(name));
    for (const v1::Device& device : worker.device_details()) {
      if (device.name() != name || device.model().empty()) continue;
      text += Join(" (", Printable(device.model()),
                   device.memory_bytes() == 0 ? "" : ", " + SizeText(static_cast<double>(device.memory_bytes())), ")");
    }
  }
  return text;
}

std::string LabelsText(const v1::WorkerInfo& worker) {
  const std::map<std::string, std::string> labels(worker.labels().begin(), worker.labels().end());
  std::string text;
  for (const auto& [key, value] : labels) text += Join(text.empty() ? "" : ",", Printable(key), "=", Printable(value));
  return text.empty() ? "-" : text;
}

}  // namespace

std::string WorkerTable(const v1::ListWorkersResponse& workers) {
  std::vector<std::vector<std::string>> rows;
  for (const v1::WorkerInfo& worker : workers.workers()) {
    std::string running;
    for (const std::string& task : worker.running()) running += (running.empty() ? "" : ",") + task;
    rows.push_back({worker.id(), worker.state(), worker.host(), Join(worker.threads()),
                    SizeText(static_cast<double>(worker.memory_bytes())), DevicesText(worker),
                    worker.free_disk_bytes() == 0 ? "-" : SizeText(static_cast<double>(worker.free_disk_bytes())), LabelsText(worker),
                    Join(DurationText(static_cast<double>(worker.last_seen_ms_ago()) * 1e-3), " ago"),
                    running.empty() ? "-" : running});
  }
  return TableText({"WORKER", "STATE", "HOST", "THREADS", "MEMORY", "DEVICES", "FREE DISK", "LABELS", "SEEN", "RUNNING"}, rows);
}

std::string JobDescription(const v1::Job& job) {
  std::string text = Join("Job       ", job.id(), "\nRecipe    ", job.recipe().name(), "\nState     ",
                          StateName(job.state()), "\nCreated   ", TimeText(job.create_time_ms()), "\n");
  if (job.end_time_ms() > 0) text += Join("Ended     ", TimeText(job.end_time_ms()), "\n");
  if (!job.reason().empty()) text += Join("Reason    ", Printable(job.reason()), "\n");
  text += Join("Tasks     ", job.tasks_done(), " of ", job.tasks_total(), " done\n");
  if (job.has_artifact())
    text += Join("Artifact  ", job.artifact().digest(), " (", SizeText(static_cast<double>(job.artifact().size())), ")\n");
  if (job.has_best())
    text += Join("Best      ", job.best().digest(), " (", SizeText(static_cast<double>(job.best().size())),
                 "): the adapter of its best trial; no model was exported\n");
  if (job.has_report()) text += Join("Report    ", job.report().digest(), "\n");
  if (job.tasks_size() > 0) text += Join("\n", TaskTable(job));
  if (job.trials_size() > 0) text += Join("\n", TrialTable(job));
  return text;
}

std::string EventText(const v1::Event& event) {
  switch (event.kind_case()) {
    case v1::Event::kTaskLeased: {
      const auto& leased = event.task_leased();
      return Join(leased.path(), ": started on ", leased.worker(),
                  leased.attempt() > 1 ? Join(" (attempt ", leased.attempt(), ")") : "");
    }
    case v1::Event::kTaskFinished: {
      const auto& finished = event.task_finished();
      std::string text = Join(finished.path(), finished.cached() ? ": taken from an earlier run"
                                                                 : Join(": done in ", DurationText(finished.seconds())));
      for (int i = 0; i < std::min(finished.measurements_size(), 3); ++i)
        text += Join(i == 0 ? "; " : ", ", MeasurementText(finished.measurements(i)));
      return text;
    }
    case v1::Event::kTaskFailed:
      return Join(event.task_failed().path(), ": failed (",
                  LowerCase(v1::FailureClass_Name(event.task_failed().error().failure_class())), "): ",
                  FirstLine(event.task_failed().error().message()),
                  event.task_failed().retry() ? "; it will be tried again" : "");
    case v1::Event::kLeaseExpired:
      return Join(event.lease_expired().path(), ": lost on ", event.lease_expired().worker(), " (",
                  event.lease_expired().reason(), "); it will be tried again");
    case v1::Event::kArtifactLost:
      return Join(event.artifact_lost().path(), event.artifact_lost().checkpoint() ? ": its checkpoint was lost; it starts anew"
                                                                                   : ": its output was lost; it runs again");
    case v1::Event::kTaskNote:
      return Join(event.task_note().path(), ": note ", event.task_note().note().code(), ": ",
                  FirstLine(event.task_note().note().text()));
    case v1::Event::kTrialFinished: {
      const auto& trial = event.trial_finished().trial();
      return Join("trial ", trial.index(), ": ",
                  trial.state() == v1::Trial::INFEASIBLE ? "infeasible" : Join("loss ", Number(trial.mean())), " (",
                  SettingsText(trial.settings()), ")");
    }
    case v1::Event::kStudyFinished:
      for (const auto& best : event.study_finished().best()) {
        if (best.selector() == "best") return Join("search ended: trial ", best.trial(), " goes on");
      }
      return "search ended";
    case v1::Event::kJobCancelRequested:
      return Join("cancelling: ", event.job_cancel_requested().reason());
    case v1::Event::kReportWritten:
      return "report written";
    default:
      return "";
  }
}

bool IsFinal(v1::Job::State state) {
  return state == v1::Job::SUCCEEDED || state == v1::Job::FAILED || state == v1::Job::CANCELLED;
}

int ExitCodeOf(const v1::Job& job) {
  if (job.state() == v1::Job::SUCCEEDED) return kOk;
  if (job.state() == v1::Job::CANCELLED) return kJobCancelled;
  bool user = std::any_of(job.tasks().begin(), job.tasks().end(), [](const v1::Task& task) {
    return task.state() == v1::Task::DEAD && task.error().failure_class() == v1::USER;
  });
  return user ? kWrongInput : kFailed;
}

std::optional<double> SecondsLeft(const v1::Job& job, const std::map<std::string, double>& phases) {
  std::map<v1::TaskKind, std::pair<double, int>> by_kind;
  std::pair<double, int> all;
  uint32_t ended = 0, running = 0;
  for (const v1::Task& task : job.tasks()) {
    if (task.state() == v1::Task::LEASED) ++running;
    if (task.state() == v1::Task::CACHED) ++ended;
    if (task.state() != v1::Task::DONE) continue;
    ++ended;
    for (auto* sum : {&by_kind[task.kind()], &all}) {
      sum->first += task.seconds();
      ++sum->second;
    }
  }
  if (all.second == 0) return std::nullopt;
  double mean = all.first / all.second;
  double left = 0;
  for (const v1::Task& task : job.tasks()) {
    if (task.state() != v1::Task::LEASED && task.state() != v1::Task::READY && task.state() != v1::Task::BLOCKED) continue;
    auto known = by_kind.find(task.kind());
    const double seconds = TaskSecondsLeft(task, known != by_kind.end() ? known->second.first / known->second.second : mean);
    const auto phase = phases.find(task.path());
    left += phase == phases.end() || task.state() != v1::Task::LEASED ? seconds : std::max(seconds, phase->second);
  }
  // Tasks that the search has not asked for yet.
  uint32_t listed = static_cast<uint32_t>(job.tasks_size());
  if (job.tasks_total() > listed) {
    auto train = by_kind.find(v1::TRAIN);
    double usual = train != by_kind.end() ? train->second.first / train->second.second : mean;
    left += usual * (job.tasks_total() - listed);
  }
  return left / std::max(1u, running);
}

}  // namespace refinery::client
