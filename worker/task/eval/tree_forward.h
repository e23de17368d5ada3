// worker/task/eval/tree_forward.h
//
// The forward pass of a batch of token trees: linear layers over all nodes at once, attention block by block along the
// ancestors of each node.
//
// Shapes: N nodes of a batch, H hidden size.  Dtypes: the model's.  No gradient.
// Errors: c10::Error on shape bugs.  Threads: thread-safe.

#pragma once

#include <ATen/core/Tensor.h>

#include "worker/task/eval/prefix_tree.h"
#include "worker/task/model/causal_lm.h"

namespace refinery::eval {

// Hidden states after the final norm, [N, H].
at::Tensor TreeHidden(const model::CausalLm& model, const TreeBatch& batch);

}  // namespace refinery::eval
