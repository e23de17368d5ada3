// tests/worker/task/train/fixture.h
//
// A student of two small layers with seeded random weights, examples over its vocabulary, and a teacher that is
// another such model, so that trainings of a few steps take milliseconds.

#pragma once

#include <ATen/core/Tensor.h>

#include <cmath>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "worker/task/train/trainer.h"

namespace refinery::train {

inline constexpr int64_t kTinyVocabulary = 96;

std::shared_ptr<model::CausalLm> TinyModel(uint64_t seed, at::ScalarType dtype = at::kFloat);

// Lengths differ; keys are "<prefix><index>".
std::vector<data::EncodedExample> TinyExamples(size_t count, uint64_t seed, const std::string& prefix);

// The logits that predict the example's answer tokens, computed for this sequence alone. [n, V]
at::Tensor AnswerLogits(const model::CausalLm& model, const data::EncodedExample& example);

// The distributions of `teacher` for all examples, written to `folder` and opened again.
std::shared_ptr<distill::LogitCache> TinyCache(const model::CausalLm& teacher,
                                               const std::vector<data::EncodedExample>& examples,
                                               const std::filesystem::path& folder, int64_t top_k);

// An empty folder below the test's temporary folder, named after the running test.
std::filesystem::path FreshFolder(const std::string& name);

// Everything a training needs.
struct TinyRun {
  explicit TinyRun(int64_t top_k = 24, at::ScalarType dtype = at::kFloat);

  std::shared_ptr<model::CausalLm> student, teacher;
  std::shared_ptr<distill::LogitCache> cache;
  TrainInputs inputs;
  TrainSettings settings;
};

// Remembers what it is told; cancels before step `cancel_at` (counted from 0) when that is not negative.
class RecordingReporter final : public runtime::Reporter {
 public:
  void Report(const runtime::Progress& progress) override { reports.push_back(progress); }
  void Note(const std::string&, const std::string&) override {}
  void CheckpointReady(const std::string& name, uint64_t step) override { checkpoints.emplace_back(name, step); }
  void Check() override {
    if (cancel_at >= 0 && static_cast<int>(reports.size()) >= cancel_at) throw runtime::CancelledException();
  }

  std::vector<runtime::Progress> reports;
  std::vector<std::pair<std::string, uint64_t>> checkpoints;
  int cancel_at = -1;
};

// True when modules and bits are the same.
bool SameBits(const checkpoint::PeftAdapter& a, const checkpoint::PeftAdapter& b);

}  // namespace refinery::train
