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

}  // namespace refinery::kernels
