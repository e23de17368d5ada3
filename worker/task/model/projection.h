// worker/task/model/projection.h
//
// Linear layers that read the same input (q k v; gate up) as one product. Their weights usually lie side by side in one
// storage (the loader puts them so) and are then multiplied at once without a copy; LoRA factors share the product x A^T.
// The gradient goes to the input and to the factors, never to a weight.
//
// Errors: c10::Error on shape bugs.  Threads: thread-safe.

#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "worker/task/model/causal_lm.h"

namespace refinery::model {

// The tensors laid one below the other as one view, or an undefined tensor when they do not lie so in one storage.
at::Tensor StackedView(const std::vector<at::Tensor>& parts);

// x [T, in] -> [T, sum of out]: the outputs of one to three layers side by side.
at::Tensor Project(const at::Tensor& x, const std::vector<const Linear*>& layers);

// silu(gate(x)) * up(x).  x [T, in] -> [T, out]
at::Tensor ProjectGated(const at::Tensor& x, const Linear& gate, const Linear& up);

// residual + layer(x).  residual [T, out], x [T, in] -> [T, out]
at::Tensor ProjectOnto(const at::Tensor& residual, const at::Tensor& x, const Linear& layer);

}  // namespace refinery::model
