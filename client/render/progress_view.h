// client/render/progress_view.h
//
// The live picture of a job on standard error: on a terminal a few lines that are redrawn (job, running tasks with progress,
// loss, tokens a second, best trial, time left), elsewhere one line an event and a progress line now and then.
//
// Threads: one.

#pragma once

#include <chrono>
#include <map>
#include <string>
#include <vector>

#include "refinery/v1/job_service.pb.h"

namespace refinery::client {

class ProgressView {
 public:
  // Draws to file descriptor `fd`.
  explicit ProgressView(int fd);
  ~ProgressView();

  void SetJob(const v1::Job& job);
  void OnEvent(const v1::Event& event);
  void OnProgress(const v1::WatchJobResponse::Progress& progress);
  // Any other remark, above the picture.
  void Note(const std::string& text);
  // Whether the coordinator is being waited for, and what to say about it.
  void SetWaiting(const std::string& reason);
  // Call a few times a second.
  void Tick();
  // Removes the picture.
  void Clear();

  // The lines of the picture, without colours; for tests.
  std::vector<std::string> Lines() const;

 private:
  using Clock = std::chrono::steady_clock;
  // Where a running task's present phase was first seen.
  struct PhaseStart {
    std::string phase;
    double done = 0;
    Clock::time_point time;
  };
  std::string TaskLine(const v1::Task& task) const;
  // What the phases of running tasks will still take, in seconds, by path.
  std::map<std::string, double> PhaseSecondsLeft() const;
  void Print(const std::string& line);
  double Elapsed() const;

  const int fd_;
  const bool live_;
  v1::Job job_;
  std::map<std::string, PhaseStart> phases_;  // by path
  std::string waiting_;
  Clock::time_point started_;
  Clock::time_point last_plain_;
  int drawn_lines_ = 0;
};

}  // namespace refinery::client
