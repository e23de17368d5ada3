#include "worker/task/model/pair_attention.h"

#include <algorithm>
#include <limits>

#include "worker/task/model/pair_simd.h"
#include "worker/task/model/simd.h"

namespace refinery::kernels {

using simd::Bf16;

#if defined(__x86_64__)
namespace {

constexpr int64_t kBlock = 16;  // positions of a key block

// What the steps of one call share.
struct Frame {
  int64_t d = 0, block0 = 0, blocks = 0;  // key blocks [block0, block0 + blocks), or
  const int32_t* listed = nullptr;      // those of this list
  Bf16* queries = nullptr;    // [R, d]
  float* scores = nullptr;    // [R, stride]
  int64_t stride = 0;         // floats of a row of scores: blocks * 16
};

template <bool kListed>
RF_BF16_INLINE int64_t PlaceOf(const Frame& f, int64_t block) {
  return kListed ? f.listed[block] : f.block0 + block;
}

// Scores of R queries against N key blocks.
template <int R, int N, bool kListed>
RF_BF16_INLINE void ScoreBlocks(const Frame& f, const Bf16* keys, int64_t block, __m512 scale) {
  const int64_t d = f.d;
  const Bf16* k[N];
  for (int n = 0; n < N; ++n) k[n] = keys + PlaceOf<kListed>(f, block + n) * kBlock * d;
  __m512 sums[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sums[r][n] = _mm512_setzero_ps();
  }
  for (int64_t j = 0; j < d; j += 2) {
    __m512bh pairs[N];
    for (int n = 0; n < N; ++n) pairs[n] = LoadPairs(k[n] + j * kBlock);
    for (int r = 0; r < R; ++r) {
      const __m512bh query = SplatPair(f.queries + r * d + j);
      for (int n = 0; n < N; ++n) sums[r][n] = _mm512_dpbf16_ps(sums[r][n], query, pairs[n]);
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) _mm512_store_ps(f.scores + r * f.stride + (block + n) * kBlock, _mm512_mul_ps(sums[r][n], scale));
  }
}

constexpr float kLowest = -std::numeric_limits<float>::infinity();

void HideOutside(float* scores, int64_t count, int64_t first, int64_t last) {
  for (int64_t t = 0; t < first; ++t) scores[t] = kLowest;
  for (int64_t t = last + 1; t < count; ++t) scores[t] = kLowest;
}

RF_BF16_TARGET void HideUnseen(float* scores, int64_t blocks, const uint16_t* seen) {
  for (int64_t b = 0; b < blocks; ++b) {
    if (seen[b] != 0xffff) _mm512_mask_store_ps(scores + b * kBlock, static_cast<__mmask16>(~seen[b]), _mm512_set1_ps(kLowest));
  }
}

// Scores become weights in bfloat16, in place (a weight at half its score's offset); returns 1 / their sum.
RF_BF16_TARGET float Weigh(float* scores, int64_t count) {
  __m512 highest = _mm512_set1_ps(kLowest), total = _mm512_setzero_ps();
  for (int64_t t = 0; t < count; t += kBlock) highest = _mm512_max_ps(highest, _mm512_load_ps(scores + t));
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(highest));
  auto* weights = reinterpret_cast<Bf16*>(scores);
  for (int64_t t = 0; t < count; t += kBlock) {
    const __m512 weight = Exp(_mm512_sub_ps(_mm512_load_ps(scores + t), top));
    total = _mm512_add_ps(total, weight);
    StoreHalves(weights + t, weight);
  }
  return 1.0f / _mm512_reduce_add_ps(total);
}

// sums += weights of positions [at, at + count) of the scores times `values`.
template <int R, int N>
RF_BF16_INLINE void MixRun(const Frame& f, const Bf16* values, int64_t at, int64_t count, __m512 (&sums)[R][N]) {
  for (int64_t t = 0; t < count; t += 2) {
    __m512bh pairs[N];
    for (int n = 0; n < N; ++n) pairs[n] = LoadPairs(values + t * f.d + n * 32);
    for (int r = 0; r < R; ++r) {
      const __m512bh weight = SplatPair(reinterpret_cast<const Bf16*>(f.scores + r * f.stride) + at + t);
      for (int n = 0; n < N; ++n) sums[r][n] = _mm512_dpbf16_ps(sums[r][n], weight, pairs[n]);
    }
  }
}

// Numbers [column, column + 16 N) of the outputs; `count` positions where the blocks are not listed.
template <int R, int N, bool kListed>
RF_BF16_INLINE void MixValues(const Frame& f, const PairAttentionItem& item, int64_t column, int64_t count, const float* inverse) {
  __m512 sums[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sums[r][n] = _mm512_setzero_ps();
  }
  const Bf16* values = item.values + column * 2;
  if (kListed) {
    for (int64_t b = 0; b < f.blocks; ++b) MixRun<R, N>(f, values + f.listed[b] * kBlock * f.d, b * kBlock, kBlock, sums);
  } else {
    MixRun<R, N>(f, values + f.block0 * kBlock * f.d, 0, count, sums);
  }
  for (int r = 0; r < R; ++r) {
    const __m512 scale = _mm512_set1_ps(inverse[r]);
    for (int n = 0; n < N; ++n) {
      StoreHalves(item.queries[r].out + column + n * 16, _mm512_mul_ps(sums[r][n], scale));
    }
  }
}

template <int R, bool kListed>
RF_BF16_INLINE void AttendBlocks(const Frame& f, const PairAttentionItem& item, int64_t count) {
  const int64_t d = f.d;
  for (int r = 0; r < R; ++r) {
    for (int64_t j = 0; j < d; j += 16) StoreHalves(f.queries + r * d + j, _mm512_loadu_ps(item.queries[r].query + j));
  }
  const __m512 scale = _mm512_set1_ps(item.scale);
  int64_t block = 0;
  for (; block + 4 <= f.blocks; block += 4) ScoreBlocks<R, 4, kListed>(f, item.keys, block, scale);
  for (; block < f.blocks; ++block) ScoreBlocks<R, 1, kListed>(f, item.keys, block, scale);
  float inverse[R];
  for (int r = 0; r < R; ++r) {
    float* scores = f.scores + r * f.stride;
    const PairQuery& query = item.queries[r];
    if (kListed) {
      HideUnseen(scores, f.blocks, query.seen);
    } else {
      HideOutside(scores, f.stride, query.first - f.block0 * kBlock, query.last - f.block0 * kBlock);
    }
    inverse[r] = Weigh(scores, f.stride);
  }
  int64_t column = 0;
  for (; column + 64 <= d; column += 64) MixValues<R, 4, kListed>(f, item, column, count, inverse);
  for (; column < d; column += 16) MixValues<R, 1, kListed>(f, item, column, count, inverse);
}

template <int R>
RF_BF16_TARGET void Attend(const PairAttentionItem& item) {
  const int64_t d = item.head_dim;
  Frame f{.d = d, .listed = item.blocks, .queries = reinterpret_cast<Bf16*>(item.scratch),
          .scores = item.scratch + kPairQueries * d / 2};
  if (item.blocks != nullptr) {
    f.blocks = item.block_count;
    f.stride = f.blocks * kBlock;
    return AttendBlocks<R, true>(f, item, 0);
  }
  int64_t first = item.queries[0].first, last = item.queries[0].last;
  for (int r = 1; r < R; ++r) {
    first = std::min(first, item.queries[r].first);
    last = std::max(last, item.queries[r].last);
  }
  f.block0 = first / kBlock;
  f.blocks = last / kBlock + 1 - f.block0;
  f.stride = f.blocks * kBlock;
  AttendBlocks<R, false>(f, item, last + 1 - f.block0 * kBlock);  // an odd count takes the next position's weight 0
}

// Two rows of 16 numbers as 16 pairs.
RF_BF16_INLINE __m512i Interleave(__m512 even, __m512 odd) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even));
  return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd)), 16));
}

RF_BF16_INLINE __m512 Widen(const Bf16* p) { return WidenHalves(p, 0xffff); }

// Scores become weights, in float32, that sum to 1.
RF_BF16_TARGET void Normalize(float* scores, int64_t count) {
  __m512 highest = _mm512_set1_ps(kLowest), total = _mm512_setzero_ps();
  for (int64_t t = 0; t < count; t += kBlock) highest = _mm512_max_ps(highest, _mm512_load_ps(scores + t));
  const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(highest));
  for (int64_t t = 0; t < count; t += kBlock) {
    const __m512 weight = Exp(_mm512_sub_ps(_mm512_load_ps(scores + t), top));
    total = _mm512_add_ps(total, weight);
    _mm512_store_ps(scores + t, weight);
  }
  const __m512 inverse = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
  for (int64_t t = 0; t < count; t += kBlock) _mm512_store_ps(scores + t, _mm512_mul_ps(_mm512_load_ps(scores + t), inverse));
}

template <int R, int N>
RF_BF16_INLINE void StoreMixed(const Frame& f, const PairGradientItem& item, int64_t column, int64_t count) {
  __m512 sums[R][N];
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) sums[r][n] = _mm512_setzero_ps();
  }
  MixRun<R, N>(f, item.keys_by_pairs + column * 2 + f.block0 * kBlock * f.d, 0, count, sums);
  for (int r = 0; r < R; ++r) {
    for (int n = 0; n < N; ++n) StoreHalves(item.queries[r].to + column + n * 16, sums[r][n]);
  }
}

template <int R>
RF_BF16_TARGET void QueryGradient(const PairGradientItem& item) {
  const int64_t d = item.head_dim;
  int64_t first = item.queries[0].first, last = item.queries[0].last;
  for (int r = 1; r < R; ++r) {
    first = std::min(first, item.queries[r].first);
    last = std::max(last, item.queries[r].last);
  }
  Frame f{.d = d, .block0 = first / kBlock, .queries = reinterpret_cast<Bf16*>(item.scratch)};
  f.blocks = last / kBlock + 1 - f.block0;
  f.stride = f.blocks * kBlock;
  f.scores = item.scratch + kPairQueries * d;
  Frame g = f;  // of the gradients against the values
  g.queries = f.queries + kPairQueries * d;
  g.scores = f.scores + kPairQueries * f.stride;
  float dots[R];  // dout . out
  for (int r = 0; r < R; ++r) {
    const PairGradientQuery& query = item.queries[r];
    std::copy_n(query.query, d, f.queries + r * d);
    std::copy_n(query.gradient, d, g.queries + r * d);
    __m512 sum = _mm512_setzero_ps();
    for (int64_t j = 0; j < d; j += 16) sum = _mm512_fmadd_ps(Widen(query.gradient + j), Widen(query.out + j), sum);
    dots[r] = _mm512_reduce_add_ps(sum);
  }
  const __m512 scale = _mm512_set1_ps(item.scale), one = _mm512_set1_ps(1.0f);
  int64_t block = 0;
  for (; block + 4 <= f.blocks; block += 4) {
    ScoreBlocks<R, 4, false>(f, item.keys, block, scale);
    ScoreBlocks<R, 4, false>(g, item.values, block, one);
  }
  for (; block < f.blocks; ++block) {
    ScoreBlocks<R, 1, false>(f, item.keys, block, scale);
    ScoreBlocks<R, 1, false>(g, item.values, block, one);
  }
  for (int r = 0; r < R; ++r) {
    float* scores = f.scores + r * f.stride;
    HideOutside(scores, f.stride, item.queries[r].first - f.block0 * kBlock, item.queries[r].last - f.block0 * kBlock);
    Normalize(scores, f.stride);
  }
  for (int r = 0; r < R; r += 2) {
    const bool pair = r + 1 < R;
    float *even = f.scores + r * f.stride, *odd = even + (pair ? f.stride : 0);
    const float *even_gradient = g.scores + r * f.stride, *odd_gradient = even_gradient + (pair ? f.stride : 0);
    const __m512 even_dot = _mm512_set1_ps(dots[r]), odd_dot = _mm512_set1_ps(dots[pair ? r + 1 : r]);
    Bf16* weights = item.weights + (r / 2 * item.capacity + f.block0 * kBlock) * 2;
    Bf16* changes = item.changes + (r / 2 * item.capacity + f.block0 * kBlock) * 2;
    for (int64_t t = 0; t < f.stride; t += kBlock) {
      const __m512 p0 = _mm512_load_ps(even + t), p1 = pair ? _mm512_load_ps(odd + t) : _mm512_setzero_ps();
      const __m512 s0 = _mm512_mul_ps(_mm512_mul_ps(p0, _mm512_sub_ps(_mm512_load_ps(even_gradient + t), even_dot)), scale);
      const __m512 s1 = _mm512_mul_ps(_mm512_mul_ps(p1, _mm512_sub_ps(_mm512_load_ps(odd_gradient + t), odd_dot)), scale);
      _mm512_storeu_si512(weights + 2 * t, Interleave(p0, p1));
      _mm512_storeu_si512(changes + 2 * t, Interleave(s0, s1));
      StoreHalves(reinterpret_cast<Bf16*>(even) + t, s0);  // for the sum over the keys: in place, behind what was read
      if (pair) StoreHalves(reinterpret_cast<Bf16*>(odd) + t, s1);
    }
  }
  const int64_t count = last + 1 - f.block0 * kBlock;  // an odd count takes the next position's zero
  int64_t column = 0;
  for (; column + 64 <= d; column += 64) StoreMixed<R, 4>(f, item, column, count);
  for (; column < d; column += 16) StoreMixed<R, 1>(f, item, column, count);
}

template <int N>
RF_BF16_INLINE void SumColumns(const PairKeySum& s, int64_t column) {
  constexpr int kKeys = 4;
  __m512 sums[kKeys][N];
  for (int i = 0; i < kKeys; ++i) {
    for (int n = 0; n < N; ++n) sums[i][n] = _mm512_setzero_ps();
  }
  for (int64_t h = 0; h < s.heads; ++h) {
    const Bf16* numbers = s.numbers + (h * (s.capacity / 2) * s.capacity + s.key) * 2;
    const Bf16* rows = s.rows + h * s.rows_stride + column * 2;
    for (int64_t pair = s.first; pair < s.last; ++pair) {
      __m512bh pairs[N];
      for (int n = 0; n < N; ++n) pairs[n] = LoadPairs(rows + pair * s.head_dim * 2 + n * 32);
      for (int i = 0; i < kKeys; ++i) {
        const __m512bh number = SplatPair(numbers + (pair * s.capacity + i) * 2);
        for (int n = 0; n < N; ++n) sums[i][n] = _mm512_dpbf16_ps(sums[i][n], number, pairs[n]);
      }
    }
  }
  for (int i = 0; i < kKeys; ++i) {
    for (int n = 0; n < N && s.to[i] != nullptr; ++n) StoreHalves(s.to[i] + column + n * 16, sums[i][n]);
  }
}

}  // namespace

void PairQueryGradient(const PairGradientItem& item) {
  switch (item.count) {
    case 1: return QueryGradient<1>(item);
    case 2: return QueryGradient<2>(item);
    case 3: return QueryGradient<3>(item);
    case 4: return QueryGradient<4>(item);
    case 5: return QueryGradient<5>(item);
    default: return QueryGradient<6>(item);
  }
}

RF_BF16_TARGET void SumOverQueries(const PairKeySum& sum) {
  int64_t column = 0;
  for (; column + 64 <= sum.head_dim; column += 64) SumColumns<4>(sum, column);
  for (; column < sum.head_dim; column += 16) SumColumns<1>(sum, column);
}

bool PairAttentionWorks(int64_t head_dim) { return HasPairs() && head_dim % 16 == 0; }

RF_BF16_TARGET void WritePairKey(const float* key, Bf16* keys, int64_t position, int64_t head_dim) {
  Bf16* column = keys + position / kBlock * kBlock * head_dim + position % kBlock * 2;
  for (int64_t j = 0; j < head_dim; j += 16) {
    alignas(32) uint32_t pairs[8];
    _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(key + j)));
    for (int64_t i = 0; i < 8; ++i) __builtin_memcpy(column + (j + 2 * i) * kBlock, &pairs[i], sizeof(uint32_t));
  }
}

// The first of a pair clears the second, so that a weight of 0 meets a number there.
RF_BF16_TARGET void WritePairValue(const float* value, Bf16* values, int64_t position, int64_t head_dim) {
  Bf16* pairs = values + position / 2 * 2 * head_dim;
  for (int64_t j = 0; j < head_dim; j += 16) {
    const __m512i halves = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(value + j)));
    if (position % 2 == 0) {
      _mm512_storeu_si512(pairs + 2 * j, halves);
    } else {
      const __m512i low = _mm512_and_si512(_mm512_loadu_si512(pairs + 2 * j), _mm512_set1_epi32(0xffff));
      _mm512_storeu_si512(pairs + 2 * j, _mm512_or_si512(low, _mm512_slli_epi32(halves, 16)));
    }
  }
}

void AttendPairs(const PairAttentionItem& item) {
  switch (item.count) {
    case 1: return Attend<1>(item);
    case 2: return Attend<2>(item);
    case 3: return Attend<3>(item);
    case 4: return Attend<4>(item);
    case 5: return Attend<5>(item);
    default: return Attend<6>(item);
  }
}

#else

bool PairAttentionWorks(int64_t) { return false; }
void WritePairKey(const float*, Bf16*, int64_t, int64_t) {}
void WritePairValue(const float*, Bf16*, int64_t, int64_t) {}
void AttendPairs(const PairAttentionItem&) {}
void PairQueryGradient(const PairGradientItem&) {}
void SumOverQueries(const PairKeySum&) {}

#endif

int64_t PairScratchFloats(int64_t span, int64_t head_dim) {
  return kPairQueries * (head_dim / 2 + (span / 16 + 2) * 16);
}

int64_t PairGradientScratchFloats(int64_t span, int64_t head_dim) {
  return kPairQueries * (head_dim + 2 * (span / 16 + 2) * 16);
}

}  // namespace refinery::kernels
