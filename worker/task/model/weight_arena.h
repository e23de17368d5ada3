// worker/task/model/weight_arena.h
//
// Memory for a model's weights on the CPU: large blocks that the kernel may back with huge pages. Reading weights is what decoding
// spends its time on, and with 4 KiB pages the walk of the page tables takes about a fifth of the bandwidth (measured).
//
// The tensors keep their block alive.  Errors: c10::Error when memory is exhausted.  Threads: one caller at a time.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>

namespace refinery::model {

class WeightArena {
 public:
  // Not initialized; contiguous, aligned to 64 bytes.
  at::Tensor Empty(at::IntArrayRef shape, at::ScalarType dtype);

 private:
  struct Block;
  std::shared_ptr<Block> block_;
  int64_t used_ = 0;
};

}  // namespace refinery::model
