// worker/task/recover/recover_state.h
//
// A checkpoint folder step-NNNNNN/ of a recovery: everything from which it goes on with the same bits.
//   values.safetensors   "value/<parameter>", "best/<parameter>" (relative changes now and at the best measurement) and
//                        "optimizer/<parameter>.<what>"
//   state.json           format, version, step, data cursor, tokens, measurements, best, fingerprint, digest of the tensors
// It appears complete or not at all: written under a hidden name, flushed, renamed (docs/formats.md).
// Errors: DATA_LOSS for damaged files, FAILED_PRECONDITION naming the setting for a checkpoint of another run.
// Threads: functions.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/recover/recover.h"
#include "worker/task/train/batches.h"

namespace refinery::recover {

struct RecoverState {
  int64_t step = 0;  // updates made
  train::DataCursor cursor;
  uint64_t tokens = 0;
  std::vector<RecoverPoint> curve;
  int64_t best_step = 0;
  double best_kl = 0;
  nlohmann::json fingerprint;  // of settings, seed, data and artifact; a resumed run must have the same
  std::map<std::string, at::Tensor> tensors;
};

// "step-000120".
std::string CheckpointName(int64_t step);
Status SaveRecoverState(const RecoverState& state, const std::filesystem::path& folder);
StatusOr<RecoverState> LoadRecoverState(const std::filesystem::path& path, const nlohmann::json& fingerprint);

}  // namespace refinery::recover
