// worker/task/runtime/reporter.h
//
// How task libraries tell the outside what they do, without logging and without protobuf. The program's adapter turns these
// calls into TaskEvent lines; tests pass a RecordingReporter or nullptr-free NullReporter.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace refinery::runtime {

struct Progress {
  std::string phase;             // "training", "layer 3/30"
  double done = 0;               // units finished
  double total = 0;              // units in all; 0 = unknown
  double loss = 0;               // nats; 0 = none
  double tokens_per_second = 0;
  uint64_t tokens_trained = 0;   // running totals of this attempt
  uint64_t tokens_generated = 0;
};

// Thrown by Reporter::Check when the coordinator has cancelled the attempt; caught in task/run_task.cc only.
struct CancelledException : std::runtime_error {
  CancelledException() : std::runtime_error("cancelled by the coordinator") {}
};

// A number that is not finite where it must be; names the first place. The trial is INFEASIBLE.
struct NumericException : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class Reporter {
 public:
  virtual ~Reporter() = default;
  virtual void Report(const Progress& progress) = 0;
  // A fallback, or anything else that must not be silent. `code` is a stable snake_case word.
  virtual void Note(const std::string& code, const std::string& text) = 0;
  // The folder <checkpoints>/<name> is complete and may be uploaded.
  virtual void CheckpointReady(const std::string& name, uint64_t step) = 0;
  // Throws CancelledException if the attempt should stop. Cheap; call it once a step.
  virtual void Check() = 0;
};

class NullReporter final : public Reporter {
 public:
  void Report(const Progress&) override {}
  void Note(const std::string&, const std::string&) override {}
  void CheckpointReady(const std::string&, uint64_t) override {}
  void Check() override {}
};

}  // namespace refinery::runtime
