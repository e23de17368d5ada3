// client/render/job_text.h
//
// Jobs, tasks, trials, events and workers as text for people.

#pragma once

#include <map>
#include <optional>
#include <string>
#include <vector>

#include "refinery/v1/job_service.pb.h"

namespace refinery::client {

std::string StateName(v1::Job::State state);
std::string StateName(v1::Task::State state);
std::string KindName(v1::TaskKind kind);
// "muon, learning rate 0.002, temperature 1.5"
std::string SettingsText(const v1::TrialSettings& settings);

std::string JobTable(const v1::ListJobsResponse& jobs);
std::string WorkerTable(const v1::ListWorkersResponse& workers);
// Everything about one job: state, tasks, trials, what it waits for, the measurements.
std::string JobDescription(const v1::Job& job);
// One line for a durable event; empty for those that people need not see.
std::string EventText(const v1::Event& event);

bool IsFinal(v1::Job::State state);
// 0, 1, 2 (a wrong input that only a task could find), or 3.
int ExitCodeOf(const v1::Job& job);
// Seconds until the job is done, from the durations of its finished tasks; nullopt while nothing is known. `phases`: what the
// present phase of a running task, by path, will still take at the speed it has; such a task takes no less.
std::optional<double> SecondsLeft(const v1::Job& job, const std::map<std::string, double>& phases = {});

}  // namespace refinery::client
