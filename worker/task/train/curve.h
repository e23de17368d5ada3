// worker/task/train/curve.h
//
// The training curve: one JSON object per optimizer step in curve.jsonl.
//   {"step": 3, "loss": ..., "kl": ..., "cross_entropy": ..., "learning_rate": ..., "tokens": ..., "seconds": ...,
//    "validation_loss": ...}          (validation_loss only where it was measured; docs/formats.md)

#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <vector>

#include "common/status.h"

namespace refinery::train {

struct CurvePoint {
  int64_t step = 0;          // 1 = after the first update
  double loss = 0;           // what was minimised, nats per answer token
  double kl = 0;             // at the training temperature, unscaled, nats per answer token; 0 without a teacher
  double cross_entropy = 0;  // nats per answer token
  double learning_rate = 0;
  uint64_t tokens = 0;       // trained so far, prompts included
  double seconds = 0;        // spent training so far, over all attempts
  std::optional<double> validation_loss;
};

// Atomic. The numbers read back are the same bits.
Status WriteCurve(const std::vector<CurvePoint>& curve, const std::filesystem::path& path);
// DATA_LOSS naming file and line.
StatusOr<std::vector<CurvePoint>> ReadCurve(const std::filesystem::path& path);

}  // namespace refinery::train
