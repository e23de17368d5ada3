#include "worker/task/generate/packed_product.h"

#include <algorithm>
#include <vector>

#include "worker/task/model/pair_simd.h"
#include "worker/task/model/simd.h"

namespace refinery::kernels {
namespace {

using simd::Bf16;

constexpr int64_t kChunk = 64, kHalf = 32, kPlaneBytes = 32;

float HalfToFloat(uint16_t half) {
  _Float16 value;
  __builtin_memcpy(&value, &half, sizeof(value));
  return static_cast<float>(value);
}

// One row of weights as float32, for CPUs without the pair instructions.
void ExpandRow(const PackedMatrix& w, int64_t output, std::vector<float>& row) {
  const int64_t chunks = (w.inputs + kChunk - 1) / kChunk, groups = (w.inputs + w.group_size - 1) / w.group_size;
  const float centre = static_cast<float>(1 << (w.bits - 1));
  for (int64_t i = 0; i < w.inputs; ++i) {
    const uint8_t* cell = w.codes + (output * chunks + i / kChunk) * w.planes * kPlaneBytes + i % kHalf;
    const int shift = i % kChunk < kHalf ? 0 : 4;
    const int code = ((cell[0] >> shift) & 15) | (w.planes == 2 ? ((cell[kPlaneBytes] >> shift) & 15) << 4 : 0);
    const int64_t group = output * groups + i / w.group_size;
    const float offset = w.offsets == nullptr ? 0.0f : w.offsets[group];
    row[static_cast<size_t>(i)] = HalfToFloat(w.scales[group]) * (static_cast<float>(code) - centre + offset);
  }
}

void PlainProduct(const PackedArguments& a, int64_t begin, int64_t end) {
  std::vector<float> row(static_cast<size_t>(a.weight.inputs));
  for (int64_t n = begin; n < end; ++n) {
    ExpandRow(a.weight, n, row);
    for (int64_t r = 0; r < a.rows; ++r) {
      const Bf16* x = a.x + r * a.weight.inputs;
      float sum = 0;
      for (int64_t i = 0; i < a.weight.inputs; ++i) sum += row[static_cast<size_t>(i)] * simd::ToFloat(x[i]);
      if (a.bias != nullptr) sum += simd::ToFloat(a.bias[n]);
      float& y = a.y[r * a.y_stride + n];
      y = a.accumulate ? y + sum : sum;
    }
  }
}

#if defined(__x86_64__)
constexpr int64_t kPanel = 16;
constexpr int kMaxRows = 4;
constexpr int64_t kMaxGroups = 2048;   // of one output: 65,536 inputs in groups of 32
constexpr int64_t kAheadBytes = 2048;  // so little is done per byte that the processor alone does not look far enough ahead

// A code c becomes a bfloat16 by one logical operation: in [128, 256) bfloat16 counts in ones, in [2048, 4096) in sixteens, so
// 0x4300 | c is 128 + c, and 0x4500 | c is 2048 + 16 c (the high plane). What is too much goes away with the group's sum of inputs,
// from which the group's sum of products starts.
constexpr short kLowPlane = 0x4300, kHighPlane = 0x4500;

float Excess(const PackedMatrix& w) {
  return w.planes == 1 ? 128.0f + static_cast<float>(1 << (w.bits - 1)) : 128.0f + 2048.0f + 128.0f;
}

// What the rows of one call share: lanes [group][row] of input sums, times -Excess where there are no offsets.
struct Starts {
  const float* lanes;
  float excess;
};

// 32 inputs of one output for R rows of x: the low (kShift 0) or high (kShift 4) halves of a chunk's bytes.
template <int R, int P, int kShift>
RF_BF16_INLINE void AddHalf(const __m512i* words, const Bf16* x, int64_t k, __mmask32 mask, __m512* sums) {
  __m512bh planes[P];
  for (int p = 0; p < P; ++p) {
    const __m512i codes = kShift == 0 ? words[p] : _mm512_srli_epi16(words[p], 4);
    // (codes & 15) | exponent
    planes[p] = (__m512bh)_mm512_ternarylogic_epi32(codes, _mm512_set1_epi16(15), _mm512_set1_epi16(p == 0 ? kLowPlane : kHighPlane), 0xea);
  }
  for (int r = 0; r < R; ++r) {
    const __m512bh input = mask == 0xffffffffu ? LoadPairs(x + r * k) : LoadPairs(x + r * k, mask);
    for (int p = 0; p < P; ++p) sums[r] = _mm512_dpbf16_ps(sums[r], input, planes[p]);
  }
}

template <int P>
RF_BF16_INLINE void LoadWords(const uint8_t* cell, __m512i* words) {
  for (int p = 0; p < P; ++p) {
    words[p] = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(cell + p * kPlaneBytes)));
  }
}

RF_BF16_INLINE __mmask32 InputsFrom(int64_t begin, int64_t inputs) {
  const int64_t left = inputs - begin;
  return left >= kHalf ? 0xffffffffu : left <= 0 ? 0u : (1u << left) - 1;
}

// Whole groups of kChunks chunks each (0: `chunks`), the hot loop: nothing but the arithmetic and running pointers.
template <int R, int P, bool kOffsets, int kChunks>
RF_BF16_INLINE void AddGroups(const Starts& starts, const uint8_t* codes, const Bf16* x, int64_t k, int64_t groups, int64_t chunks,
                              const float* scales, const float* offsets, __m512* total) {
  const float* start = starts.lanes;
  __m512i words[P];
  for (int64_t g = 0; g < groups; ++g, start += 16 * R) {
    __m512 sums[R];
    for (int r = 0; r < R; ++r) {
      sums[r] = _mm512_loadu_ps(start + 16 * r);
      if (kOffsets) sums[r] = _mm512_mul_ps(sums[r], _mm512_set1_ps(offsets[g] - starts.excess));
    }
    for (int64_t c = 0; c < (kChunks == 0 ? chunks : kChunks); ++c) {
      LoadWords<P>(codes, words);
      _mm_prefetch(reinterpret_cast<const char*>(codes) + kAheadBytes, _MM_HINT_T0);
      AddHalf<R, P, 0>(words, x, k, 0xffffffffu, sums);
      AddHalf<R, P, 4>(words, x + kHalf, k, 0xffffffffu, sums);
      codes += P * kPlaneBytes;
      x += kChunk;
    }
    for (int r = 0; r < R; ++r) total[r] = _mm512_fmadd_ps(sums[r], _mm512_set1_ps(scales[g]), total[r]);
  }
}

// Groups [first, groups) by halves of chunks: groups that are no whole chunks, and the end of a row.
template <int R, int P, bool kOffsets>
RF_BF16_INLINE void AddRest(const PackedMatrix& w, const Starts& starts, const uint8_t* codes, const Bf16* x, int64_t first,
                            const float* scales, const float* offsets, __m512* total) {
  const int64_t k = w.inputs, halves = (k + kHalf - 1) / kHalf, of_group = w.group_size / kHalf;
  const int64_t groups = (k + w.group_size - 1) / w.group_size;
  __m512i words[P];
  for (int64_t g = first; g < groups; ++g) {
    __m512 sums[R];
    for (int r = 0; r < R; ++r) {
      sums[r] = _mm512_loadu_ps(starts.lanes + (g * R + r) * 16);
      if (kOffsets) sums[r] = _mm512_mul_ps(sums[r], _mm512_set1_ps(offsets[g] - starts.excess));
    }
    for (int64_t half = g * of_group; half < std::min((g + 1) * of_group, halves); ++half) {
      LoadWords<P>(codes + half / 2 * P * kPlaneBytes, words);
      const __mmask32 mask = InputsFrom(half * kHalf, k);
      if (half % 2 == 0) {
        AddHalf<R, P, 0>(words, x + half * kHalf, k, mask, sums);
      } else {
        AddHalf<R, P, 4>(words, x + half * kHalf, k, mask, sums);
      }
    }
    for (int r = 0; r < R; ++r) total[r] = _mm512_fmadd_ps(sums[r], _mm512_set1_ps(scales[g]), total[r]);
  }
}

// One output's row of weights against R rows of x: lanes of sums. `scales` are this output's, widened.
template <int R, int P, bool kOffsets>
RF_BF16_INLINE void PackedRow(const PackedArguments& a, const Starts& starts, const Bf16* x, int64_t output, const float* scales,
                              __m512* out) {
  const PackedMatrix& w = a.weight;
  const int64_t k = w.inputs, row_chunks = (k + kChunk - 1) / kChunk, chunks = w.group_size / kChunk;
  const float* offsets = kOffsets ? w.offsets + output * ((k + w.group_size - 1) / w.group_size) : nullptr;
  const uint8_t* codes = w.codes + output * row_chunks * P * kPlaneBytes;
  const int64_t whole = w.group_size % kChunk == 0 ? k / w.group_size : 0;
  __m512 total[R];
  for (int r = 0; r < R; ++r) total[r] = _mm512_setzero_ps();
  switch (chunks) {
    case 1: AddGroups<R, P, kOffsets, 1>(starts, codes, x, k, whole, 1, scales, offsets, total); break;
    case 2: AddGroups<R, P, kOffsets, 2>(starts, codes, x, k, whole, 2, scales, offsets, total); break;
    default: AddGroups<R, P, kOffsets, 0>(starts, codes, x, k, whole, chunks, scales, offsets, total);
  }
  if (whole * w.group_size < k) AddRest<R, P, kOffsets>(w, starts, codes, x, whole, scales, offsets, total);
  for (int r = 0; r < R; ++r) out[r * kPanel] = total[r];
}

RF_BF16_INLINE void WidenScales(const uint16_t* from, int64_t count, float* to) {
  for (int64_t g = 0; g < count; g += 16) {
    const __mmask16 mask = count - g >= 16 ? 0xffffu : static_cast<__mmask16>((1u << (count - g)) - 1);
    _mm512_storeu_ps(to + g, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, from + g)));
  }
}

// lanes [groups][rows][16] for rows [row, row + rows) of x.
RF_BF16_TARGET void MakeStarts(const PackedArguments& a, int64_t row, int64_t rows, float* lanes) {
  const PackedMatrix& w = a.weight;
  const __m512 factor = _mm512_set1_ps(w.offsets == nullptr ? -Excess(w) : 1.0f);
  const int64_t groups = (w.inputs + w.group_size - 1) / w.group_size;
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t r = 0; r < rows; ++r) {
      const Bf16* x = a.x + (row + r) * w.inputs;
      __m512 sum = _mm512_setzero_ps();
      for (int64_t i = g * w.group_size; i < std::min((g + 1) * w.group_size, w.inputs); i += kHalf) {
        sum = _mm512_dpbf16_ps(sum, LoadPairs(x + i, InputsFrom(i, w.inputs)), (__m512bh)_mm512_set1_epi16(0x3f80));
      }
      _mm512_storeu_ps(lanes + (g * rows + r) * 16, _mm512_mul_ps(sum, factor));
    }
  }
}

template <int R, int P, bool kOffsets>
RF_BF16_TARGET void PackedRows(const PackedArguments& a, int64_t row, int64_t begin, int64_t end) {
  const int64_t groups = (a.weight.inputs + a.weight.group_size - 1) / a.weight.group_size;
  thread_local std::vector<float> lanes;
  lanes.resize(std::max(lanes.size(), static_cast<size_t>(groups * R * 16)));
  MakeStarts(a, row, R, lanes.data());
  const Starts starts{lanes.data(), Excess(a.weight)};
  alignas(64) float scales[kMaxGroups + 16];
  for (int64_t output = begin; output < end; output += kPanel) {
    const int64_t count = std::min(kPanel, end - output);
    __m512 sums[R * kPanel];
    if (count < kPanel) std::fill_n(sums, R * kPanel, _mm512_setzero_ps());
    for (int64_t n = 0; n < count; ++n) {
      WidenScales(a.weight.scales + (output + n) * groups, groups, scales);
      PackedRow<R, P, kOffsets>(a, starts, a.x + row * a.weight.inputs, output + n, scales, sums + n);
    }
    const auto mask = static_cast<__mmask16>((1u << count) - 1);
    for (int r = 0; r < R; ++r) {
      float* y = a.y + (row + r) * a.y_stride + output;
      __m512 sum = SumRows(sums + r * kPanel);
      if (a.bias != nullptr) sum = _mm512_add_ps(sum, WidenHalves(a.bias + output, mask));
      if (a.accumulate) sum = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, y), sum);
      _mm512_mask_storeu_ps(y, mask, sum);
    }
  }
}

template <int P, bool kOffsets>
RF_BF16_TARGET void PairPackedProduct(const PackedArguments& a, int64_t begin, int64_t end) {
  for (int64_t row = 0; row < a.rows; row += kMaxRows) {
    switch (std::min<int64_t>(kMaxRows, a.rows - row)) {
      case 1: PackedRows<1, P, kOffsets>(a, row, begin, end); break;
      case 2: PackedRows<2, P, kOffsets>(a, row, begin, end); break;
      case 3: PackedRows<3, P, kOffsets>(a, row, begin, end); break;
      default: PackedRows<kMaxRows, P, kOffsets>(a, row, begin, end); break;
    }
  }
}
#endif

}  // namespace

void PackedProduct(const PackedArguments& a, int64_t begin, int64_t end) {
#if defined(__x86_64__)
  if (HasPairs() && a.weight.inputs <= kMaxGroups * a.weight.group_size) {
    if (a.weight.planes == 1) {
      return a.weight.offsets == nullptr ? PairPackedProduct<1, false>(a, begin, end) : PairPackedProduct<1, true>(a, begin, end);
    }
    return a.weight.offsets == nullptr ? PairPackedProduct<2, false>(a, begin, end) : PairPackedProduct<2, true>(a, begin, end);
  }
#endif
  PlainProduct(a, begin, end);
}

}  // namespace refinery::kernels
