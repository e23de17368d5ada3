// worker/task/model/packed_weight.h
//
// The weight of a linear layer as it is after quantization: codes of up to 4 bits, or of 8, with a scale per group of inputs.
// A decoding step reads these bytes instead of four times as many; prompts expand one layer at a time.
//
// Layout. Inputs go in chunks of 64, the last one filled with zeros. A chunk of one output is 32 bytes per plane: byte j holds the
// code of input j in its low half and of input j + 32 in its high half. Codes of up to 4 bits have one plane; codes of 8 bits two,
// the low halves of the codes and then the high ones.
//   codes [outputs, chunks * planes * 32] uint8, scales [outputs, groups] float16,
//   offsets [outputs, groups] float32 = 2^(bits-1) - zero point, undefined where all are 0 (symmetric)
//   weight = scale * (code - 2^(bits-1) + offset)
//
// Source of the codes: GPTQ tensors (checkpoint/gptq_weights.h).  Errors: DATA_LOSS as DequantizeGptq.  Threads: immutable.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>

#include "common/status.h"
#include "worker/task/checkpoint/gptq_weights.h"
#include "worker/task/model/weight_arena.h"

namespace refinery::model {

struct PackedWeight {
  static constexpr int64_t kChunk = 64, kPlaneBytes = 32, kGroupUnit = 32;

  int64_t outputs = 0, inputs = 0, group_size = 0, bits = 0;
  at::Tensor codes, scales, offsets;

  int64_t planes() const { return bits == 8 ? 2 : 1; }
  int64_t chunks() const { return (inputs + kChunk - 1) / kChunk; }
  int64_t groups() const { return (inputs + group_size - 1) / group_size; }
  int64_t bytes() const;

  // [outputs, inputs], equal to DequantizeGptq's in float32, rounded once to any other dtype.
  at::Tensor Expand(at::ScalarType dtype) const;

  // Whether the layout can hold it: inputs in order of their groups, groups of a multiple of 32 inputs.
  static bool Takes(const checkpoint::GptqTensors& tensors, const checkpoint::GptqFormat& format);
  // codes [out, in] uint8, scales [out, groups], offsets [out, groups] or undefined; group_size a multiple of kGroupUnit.
  static std::shared_ptr<const PackedWeight> FromCodes(const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& offsets,
                                                       int64_t bits, int64_t group_size, WeightArena& arena);
  static StatusOr<std::shared_ptr<const PackedWeight>> Pack(const checkpoint::GptqTensors& tensors,
                                                            const checkpoint::GptqFormat& format, WeightArena& arena);
};

}  // namespace refinery::model
