// worker/task/context.h
//
// Where one task finds its inputs and leaves its outputs, and how it speaks to the agent.

#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/runtime/reporter.h"

namespace refinery::task {

// An evaluated number (proto Measurement).
struct Measurement {
  std::string name;
  double value = 0;
  double standard_error = 0;
  uint64_t count = 0;
  std::string unit;
};

// Writes TaskEvent lines (the JSON form of proto TaskEvent) to standard output. One thread.
class EventWriter final : public runtime::Reporter {
 public:
  void Report(const runtime::Progress& progress) override;
  void Note(const std::string& code, const std::string& text) override;
  void CheckpointReady(const std::string& name, uint64_t step) override;
  void Check() override;  // throws when SIGTERM has arrived
  void Measure(const Measurement& measurement);
  void Error(const std::string& failure_class, const Status& status);
};

// SIGTERM asks the task to stop at its next Check().
void InstallStopHandler();

struct TaskContext {
  std::string job;
  std::string path;                   // of the task in its plan
  uint64_t seed = 0;
  std::filesystem::path inputs;       // <inputs>/<name>/...
  std::filesystem::path outputs;      // exists and is empty
  std::filesystem::path checkpoints;  // may be empty: then none are written
  std::filesystem::path resume;       // a checkpoint folder, or empty
  std::filesystem::path cache;        // the worker's cache: models
  EventWriter& events;

  bool HasInput(const std::string& name) const;
  // NOT_FOUND naming the input.
  StatusOr<std::filesystem::path> Input(const std::string& name) const;
  // The only *.jsonl or *.csv file of an input that a user uploaded; its rows may be any of data/table.h's formats.
  StatusOr<std::filesystem::path> InputJsonl(const std::string& name) const;
};

}  // namespace refinery::task
