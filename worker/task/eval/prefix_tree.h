// worker/task/eval/prefix_tree.h
//
// Sequences laid out as trees, so that a prefix which several of them share is computed once: all choices of a question, all
// questions behind the same few-shot text, identical inputs.
//
// A block is a tree of tokens (nodes in depth-first order, each attending to its ancestors); a batch is several blocks, which
// do not see each other. Sorting the sequences brings those with a common prefix together; a block ends when what it would
// share with the next sequence is not worth the larger attention square.
//
// Threads: pure functions.

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace refinery::eval {

struct TreeBlock {
  int64_t begin = 0;                // first node in the batch
  std::vector<int64_t> parents;     // within the block; -1 for a root
  bool chain = true;                // every node's parent is the node before it: plain causal attention
};

// Where the last `kept` tokens of one sequence lie.
struct TreePath {
  size_t sequence = 0;              // index into the input of PlanTrees
  std::vector<int64_t> nodes;       // in the batch, in the order of the tokens
};

struct TreeBatch {
  std::vector<int64_t> token_ids;   // [N]
  std::vector<int64_t> positions;   // [N] depth below the root
  std::vector<TreeBlock> blocks;
  std::vector<TreePath> paths;
};

struct TreeLimits {
  int64_t batch_tokens = 2048;      // a batch closes when it has that many (a longer sequence gets a batch of its own)
  int64_t block_tokens = 1024;      // a block takes no further sequence beyond that
  int64_t min_shared = 8;           // tokens; less is computed again in a new block
};

struct TreeSequence {
  std::vector<int32_t> tokens;      // at least one
  int64_t kept = 1;                 // of how many last tokens the nodes are wanted
};

std::vector<TreeBatch> PlanTrees(const std::vector<TreeSequence>& sequences, const TreeLimits& limits);

}  // namespace refinery::eval
