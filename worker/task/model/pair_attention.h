// worker/task/model/pair_attention.h
//
// Attention over the cache by the bfloat16 dot-product instructions, for decoding and for prompts alike: a few queries that share
// a key-value head are taken through all keys, softmax in float32, then through all values. Queries and weights are rounded to
// bfloat16 before their products, as flash attention in bfloat16 does; sums are float32.
//
// Its cache holds pairs. For one (slot, key-value head) with room for `capacity` positions (a multiple of 16), d a multiple of 16:
//   keys    [capacity/16, d/2, 16, 2]   the pair is two neighbouring numbers of a key
//   values  [capacity/2, d, 2]          the pair is one number of two neighbouring positions
// A query's result depends on the query and its positions alone, to the last bit: not on what shares the call.
//
// Only where PairAttentionWorks().  Threads: pure functions on what they are given.

#pragma once

#include <cstdint>

#include "worker/task/model/bf16.h"

namespace refinery::kernels {

bool PairAttentionWorks(int64_t head_dim);

// key, value [d] float32 into the cache's position.
void WritePairKey(const float* key, simd::Bf16* keys, int64_t position, int64_t head_dim);
void WritePairValue(const float* value, simd::Bf16* values, int64_t position, int64_t head_dim);

constexpr int kPairQueries = 6;  // at most, in one call

struct PairQuery {
  const float* query;   // [d], rotated
  simd::Bf16* out;      // [d]
  int64_t first, last;  // positions it sees, both included; where the item lists blocks:
  const uint16_t* seen = nullptr;  // [block_count] a bit for each position of a block, the lowest for the first
};

struct PairAttentionItem {
  PairQuery queries[kPairQueries];
  int count;
  const simd::Bf16* keys;
  const simd::Bf16* values;
  float* scratch;       // PairScratchFloats(...) floats, aligned to 64 bytes
  int64_t head_dim;
  float scale;
  // Token trees: only these blocks of 16 positions are looked at, of which a query sees at least one position. Every position
  // of a listed block must hold numbers.
  const int32_t* blocks = nullptr;
  int64_t block_count = 0;
};
// For items whose positions span at most `span` (last - first + 1 over all their queries, or 16 block_count).
int64_t PairScratchFloats(int64_t span, int64_t head_dim);
void AttendPairs(const PairAttentionItem& item);

// The gradient of attention in two steps, by formulas of arXiv:2205.14135 (B.4). With p a query's weights, s their scores:
//   ds = p (dout . value - dout . out) scale;   dquery = sum of ds key;   dkey = sum of ds query;   dvalue = sum of p dout
// The first step takes neighbouring queries of one head, the first at an even position, and leaves p and ds of every pair of
// queries side by side for the second; p and ds are rounded to bfloat16.
struct PairGradientQuery {
  const simd::Bf16 *query, *out, *gradient;  // [d]; query rotated
  simd::Bf16* to;                            // [d] dquery
  int64_t first, last;                       // positions it sees, both included
};
struct PairGradientItem {
  PairGradientQuery queries[kPairQueries];
  int count;
  const simd::Bf16 *keys, *values;   // both laid out as keys; positions up to the capacity hold numbers
  const simd::Bf16* keys_by_pairs;   // laid out as values
  simd::Bf16 *weights, *changes;     // [.., capacity, 2] p and ds from the first pair of queries on, written where a query sees
  int64_t capacity;
  float* scratch;                    // PairGradientScratchFloats(...) floats, aligned to 64 bytes
  int64_t head_dim;
  float scale;
};
int64_t PairGradientScratchFloats(int64_t span, int64_t head_dim);
void PairQueryGradient(const PairGradientItem& item);

// to[i] = sum over heads h and pairs of queries in [first, last) of numbers[h, pair, key + i] x rows[h, pair], for four keys of
// one block.
struct PairKeySum {
  const simd::Bf16* numbers;  // [heads, capacity / 2, capacity, 2]
  const simd::Bf16* rows;     // [heads, capacity / 2, d, 2], a head rows_stride numbers after the last
  int64_t rows_stride;
  int64_t heads, capacity, head_dim;
  int64_t first, last;        // pairs
  int64_t key;
  simd::Bf16* to[4];          // [d]; null past the sequence's end
};
void SumOverQueries(const PairKeySum& sum);

}  // namespace refinery::kernels
