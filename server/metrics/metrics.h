// server/metrics/metrics.h
//
// The coordinator's Prometheus metrics, served over HTTP at /metrics. It only watches: nothing is decided here. Names and
// labels: docs/operations.md; labels never carry job or trial ids.
//
// Threads: any.

#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <utility>

#include "common/status.h"
#include "refinery/v1/events.pb.h"
#include "refinery/v1/job_service.pb.h"

namespace refinery::metrics {

// What is counted afresh from time to time.
struct Snapshot {
  std::map<v1::Job::State, uint64_t> jobs;
  std::map<std::pair<v1::TaskKind, v1::Task::State>, uint64_t> tasks;
  std::map<std::string, uint64_t> workers;  // by state
  double heartbeat_age_seconds = 0;         // the longest among workers that are not lost
  uint64_t cas_bytes = 0;
  uint64_t cas_blobs = 0;
  uint64_t stale_commits = 0;               // since start
};

class Metrics {
 public:
  Metrics();
  ~Metrics();

  // Serves /metrics on "HOST:PORT" (port 0: any); returns the address in use. UNAVAILABLE when the port is taken.
  StatusOr<std::string> Serve(const std::string& address);

  // One event that was committed, on a task of `kind` (unspecified for events about jobs and trials).
  void OnEvent(const v1::Event& event, v1::TaskKind kind);
  void OnCommit(double seconds);
  // Share of the state folder's disk that is used, and what follows from it.
  void OnDisk(double used, bool full, bool read_only);
  void OnCollected(uint64_t bytes);
  void OnProgress(v1::TaskKind kind, const v1::TaskProgress& before, const v1::TaskProgress& after);
  void Update(const Snapshot& snapshot);

  // The page as a scraper sees it.
  std::string Text() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

// "train" for TRAIN: how enum values stand in labels.
std::string LabelOf(const std::string& enum_name);

}  // namespace refinery::metrics
