// tests/worker/task/recover/fixture.h
//
// The tiny model of the quantize tests, rounded to nearest, and sequences to tune it on.

#pragma once

#include <unistd.h>

#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "tests/worker/task/quantize/tiny_model.h"
#include "worker/task/quantize/model_quantizer.h"
#include "worker/task/recover/recover.h"

namespace refinery::recover {

inline std::shared_ptr<model::CausalLm> Source(at::ScalarType dtype = at::kFloat) {
  return refinery::testing::TinyModel(refinery::testing::TinyTensors(at::kFloat), dtype);
}

// 3 bits in groups of 16.
inline quantize::QuantizedModel Rounded() {
  return quantize::RoundModelToNearest(*Source(), {.bits = 3, .group_size = 16});
}

// An empty folder below the test's temporary folder.
inline std::filesystem::path FreshFolder(const std::string& name) {
  const std::filesystem::path folder = std::filesystem::path(::testing::TempDir()) / (name + "." + std::to_string(::getpid()));
  std::filesystem::remove_all(folder);
  std::filesystem::create_directories(folder);
  return folder;
}

// Remembers what it is told; cancels once `cancel_after` steps were reported, where that is positive.
class RecordingReporter final : public runtime::Reporter {
 public:
  void Report(const runtime::Progress& progress) override { reports.push_back(progress); }
  void Note(const std::string& code, const std::string&) override { notes.push_back(code); }
  void CheckpointReady(const std::string& name, uint64_t) override { checkpoints.push_back(name); }
  void Check() override {
    if (cancel_after > 0 && static_cast<int>(reports.size()) >= cancel_after) throw runtime::CancelledException();
  }

  std::vector<runtime::Progress> reports;
  std::vector<std::string> notes, checkpoints;
  int cancel_after = 0;
};

}  // namespace refinery::recover
