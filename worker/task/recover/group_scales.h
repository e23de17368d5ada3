// worker/task/recover/group_scales.h
//
// The scales of one quantized linear layer as something that can be tuned: weights from scales, and the gradient of the scales
// from the gradient of the weights. The codes and zero points never change.
//
//   w[o, i] = s[o, g(i)] (code[o, i] - zero[o, g(i)])        d L / d s[o, g] = sum over i in g of d L / d w[o, i] (code - zero)
//
// Shapes: codes [out, in], scales [out, groups].  Dtypes: scales float32 here, float16 as they are stored; weights and their
// gradients of any float dtype (bfloat16 and float32 on the CPU take the kernels of row_kernels.h).
// Errors: c10::Error on shape bugs.  Threads: const after construction.

#pragma once

#include <ATen/core/Tensor.h>

#include "worker/task/quantize/gptq.h"

namespace refinery::recover {

class GroupScales {
 public:
  GroupScales(const quantize::QuantizedLinear& linear, at::Device device);

  // As they were given. [out, groups] float32
  const at::Tensor& initial() const { return initial_; }

  // What storage would give back of `scales` [out, groups]: rounded to float16, of the same sign as before, finite and never 0.
  at::Tensor Stored(const at::Tensor& scales) const;

  // Writes the weights [out, in] of these scales.
  void Expand(const at::Tensor& scales, const at::Tensor& weight) const;

  // d L / d scales [out, groups] float32 from d L / d weights [out, in].
  at::Tensor Gradient(const at::Tensor& weight_gradient) const;

 private:
  at::Tensor codes_;      // [out, in] uint8
  at::Tensor zeros_;      // [out, groups] float32
  at::Tensor initial_;
  at::Tensor group_of_;   // [in] int32; undefined = column / group_size
  int64_t group_size_ = 0;
};

}  // namespace refinery::recover
