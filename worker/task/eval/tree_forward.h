// worker/task/eval/tree_forward.h
//
// The forward pass of a batch of token trees: linear layers over all nodes at once, attention block by block along the
// ancestors of each node.
//
// Shapes: N nodes of a batch, H hidden size.  Dtypes: the model's.  No gradient.
// Errors: c10::Error on shape bugs.  Threads: thread-safe.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <vector>

#include "worker/task/eval/prefix_tree.h"
#include "worker/task/model/causal_lm.h"

namespace refinery::eval {

// Hidden states after the final norm of `nodes` (indices into the batch), [n, H] in their order.
at::Tensor TreeHidden(const model::CausalLm& model, const TreeBatch& batch, const std::vector<int64_t>& nodes);

}  // namespace refinery::eval
