// worker/task/quantize/hessian.h
//
// The Hessian of a linear layer's squared output error, X^T X over all calibration tokens, accumulated chunk by chunk. Layers
// that read the same input (q, k, v; gate, up) share one.
//
// Source: Frantar et al. 2022, arXiv:2210.17323, section 3 (the factor 2 / tokens is left out: GPTQ does not depend on it).
// Shapes: chunks [tokens, in].  Dtypes: inputs of any float dtype, sums in float32 (each product of two bfloat16 values is
// exact there); only blocks on and above the diagonal are computed.
// Errors: c10::Error for a chunk of another width.  Threads: one writer.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace refinery::quantize {

class Hessian {
 public:
  Hessian(int64_t columns, at::Device device);

  void Add(const at::Tensor& inputs);  // [tokens, in]
  int64_t tokens() const { return tokens_; }
  // [in, in] float32, exactly symmetric.
  at::Tensor Matrix() const;

 private:
  at::Tensor upper_;  // blocks on and above the diagonal hold the sums
  int64_t tokens_ = 0;
};

}  // namespace refinery::quantize
