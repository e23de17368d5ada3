// worker/task/train/training_state.h
//
// A checkpoint folder step-NNNNNN/: everything from which training goes on with the same bits.
//   adapter_config.json, adapter_model.safetensors   factors (PEFT format)
//   optimizer.safetensors                            optimizer state by parameter name
//   curve.jsonl                                      the curve so far
//   state.json                                       format, version, step, data cursor, tokens, fingerprint, file
//   digests
// It appears complete or not at all: written under a hidden name, flushed, renamed (docs/formats.md).

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/checkpoint/peft_adapter.h"
#include "worker/task/train/batches.h"
#include "worker/task/train/curve.h"

namespace refinery::train {

struct TrainingState {
  int64_t step = 0;  // updates made
  DataCursor cursor;
  uint64_t tokens = 0;
  nlohmann::json fingerprint;  // of settings, seed and data; a resumed run must have the same
  checkpoint::PeftAdapter adapter;
  std::map<std::string, at::Tensor> optimizer;
  std::vector<CurvePoint> curve;
};

// "step-000010"
std::string CheckpointName(int64_t step);

// Writes <folder>/step-NNNNNN, replacing one of that name.
Status SaveTrainingState(const TrainingState& state, const std::filesystem::path& folder);

// `path` is a step-NNNNNN folder. NOT_FOUND, DATA_LOSS naming the file; FAILED_PRECONDITION naming the first field in
// which the fingerprint differs from the wanted one.
StatusOr<TrainingState> LoadTrainingState(const std::filesystem::path& path, const nlohmann::json& fingerprint);

}  // namespace refinery::train
