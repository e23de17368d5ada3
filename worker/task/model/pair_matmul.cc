#include "worker/task/model/pair_matmul.h"

#include <algorithm>
#include <limits>

#include "worker/task/model/pair_simd.h"

namespace refinery::kernels {

using simd::Bf16;

namespace {

constexpr int kVectors = 4;         // of a panel: 64 outputs
constexpr int kTileRows = 6;        // 6 x 4 sums, 4 weights and an input fill the 32 registers
constexpr int64_t kUnitRows = 126;  // whole tiles; few enough that threads end together

int64_t RowParts(int64_t rows) { return std::max<int64_t>(1, (rows + kUnitRows / 2) / kUnitRows); }

int64_t PanelWidth(const PairMatmul& m) { return m.up != nullptr ? kPanelOutputs / 2 : kPanelOutputs; }

}  // namespace

int64_t PairMatmulUnits(const PairMatmul& m) {
  return m.rows == 0 ? 0 : (m.outputs + PanelWidth(m) - 1) / PanelWidth(m) * RowParts(m.rows);
}

int64_t PairPanelNumbers(int64_t inputs) { return inputs / 2 * kPanelOutputs; }

#if defined(__x86_64__)
namespace {

// rows[i] lane j becomes rows[j] lane i.
RF_BF16_INLINE void Transpose(__m512i* rows) {
  __m512i a[16], b[16];
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 4; ++i) {
    for (int j = 0; j < 2; ++j) {
      b[4 * i + 2 * j] = _mm512_unpacklo_epi64(a[4 * i + j], a[4 * i + 2 + j]);
      b[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(a[4 * i + j], a[4 * i + 2 + j]);
    }
  }
  // b[4 i + c]: column c of each 128-bit lane, rows 4 i .. 4 i + 3.
  for (int c = 0; c < 4; ++c) {
    const __m512i low01 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0x88), high01 = _mm512_shuffle_i32x4(b[c], b[4 + c], 0xdd);
    const __m512i low23 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0x88), high23 = _mm512_shuffle_i32x4(b[8 + c], b[12 + c], 0xdd);
    rows[c] = _mm512_shuffle_i32x4(low01, low23, 0x88);
    rows[8 + c] = _mm512_shuffle_i32x4(low01, low23, 0xdd);
    rows[4 + c] = _mm512_shuffle_i32x4(high01, high23, 0x88);
    rows[12 + c] = _mm512_shuffle_i32x4(high01, high23, 0xdd);
  }
}

// `count` rows of W (up to 16) into vector `vector` of the panel [inputs / 2, 64] of pairs; rows beyond are zero.
RF_BF16_TARGET void LayVector(const Bf16* weight, int64_t inputs, int64_t count, uint32_t* panel) {
  const int64_t pairs = inputs / 2;
  for (int64_t c = 0; c < pairs; c += 16) {
    const int64_t width = std::min<int64_t>(16, pairs - c);
    const auto mask = static_cast<__mmask16>((1u << width) - 1);
    __m512i rows[16];
    for (int64_t r = 0; r < 16; ++r) {
      rows[r] = r < count ? _mm512_maskz_loadu_epi32(mask, weight + r * inputs + 2 * c) : _mm512_setzero_si512();
    }
    Transpose(rows);
    for (int64_t j = 0; j < width; ++j) _mm512_store_si512(panel + (c + j) * kPanelOutputs, rows[j]);
  }
}

// Rows [begin, begin + count) of W into the panel's vectors from `vector` on, `vectors` of them.
void LayRows(const Bf16* weight, int64_t inputs, int64_t begin, int64_t count, int vector, int vectors, uint32_t* panel) {
  for (int v = 0; v < vectors; ++v) {
    const int64_t first = 16 * v, rows = std::clamp<int64_t>(count - first, 0, 16);
    LayVector(weight + (begin + first) * inputs, inputs, rows, panel + (vector + v) * 16);
  }
}

constexpr int64_t kAheadBytes = 512;  // of the panel, which streams from the second-level cache

// One pair of inputs.
template <int R>
RF_BF16_INLINE void MultiplyPair(const Bf16* x, int64_t stride, const uint32_t* panel, __m512 (&sums)[R][kVectors]) {
  __m512bh weights[kVectors];
  for (int v = 0; v < kVectors; ++v) {
    weights[v] = (__m512bh)_mm512_load_si512(panel + v * 16);
    _mm_prefetch(reinterpret_cast<const char*>(panel + v * 16) + kAheadBytes, _MM_HINT_T0);
  }
  for (int r = 0; r < R; ++r) {
    const __m512bh input = SplatPair(x + r * stride);
    for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], input, weights[v]);
  }
}

template <int R>
RF_BF16_INLINE void Multiply(const Bf16* x, int64_t stride, const uint32_t* panel, int64_t inputs, __m512 (&sums)[R][kVectors]) {
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_setzero_ps();
  }
  int64_t c = 0;
  for (; c + 32 <= inputs; c += 32, panel += 16 * kPanelOutputs) {
    // The rows of the next tile, a cache line each; past the last one a prefetch does no harm.
    for (int r = 0; r < R; ++r) _mm_prefetch(reinterpret_cast<const char*>(x + (R + r) * stride + c), _MM_HINT_T0);
    for (int i = 0; i < 16; ++i) MultiplyPair<R>(x + c + 2 * i, stride, panel + i * kPanelOutputs, sums);
  }
  for (; c < inputs; c += 2, panel += kPanelOutputs) MultiplyPair<R>(x + c, stride, panel, sums);
}

// e^x; 0 below -87, infinity above 88.
RF_BF16_INLINE __m512 Exp(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504088896341f)), _MM_FROUND_TO_NEAREST_INT);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  for (const float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
  }
  p = _mm512_fmadd_ps(p, _mm512_mul_ps(r, r), _mm512_add_ps(r, _mm512_set1_ps(1.0f)));
  const __mmask16 seen = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GE_OQ);
  return _mm512_maskz_scalef_ps(seen, p, n);
}

RF_BF16_INLINE __m512 Silu(__m512 x) {
  return _mm512_div_ps(x, _mm512_add_ps(_mm512_set1_ps(1.0f), Exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

RF_BF16_INLINE void StoreHalves(Bf16* to, __mmask16 mask, __m512 x) {
  _mm256_mask_storeu_epi16(to, mask, (__m256i)_mm512_cvtneps_pbh(x));
}

RF_BF16_INLINE __mmask16 LanesBelow(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1);
}

// Outputs [begin, begin + count) of rows [row, row + R).
template <int R>
RF_BF16_TARGET void Tile(const PairMatmul& m, const uint32_t* panel, int64_t row, int64_t begin, int64_t count) {
  __m512 sums[R][kVectors];
  Multiply<R>(m.x + row * m.x_stride, m.x_stride, panel, m.inputs, sums);
  const int vectors = m.up != nullptr ? kVectors / 2 : kVectors;
  for (int v = 0; v < vectors; ++v) {
    const __mmask16 mask = LanesBelow(count - 16 * v);
    if (mask == 0) return;
    const int64_t column = begin + 16 * v;
    const __m512 bias = m.bias == nullptr ? _mm512_setzero_ps() : WidenHalves(m.bias + column, mask);
    for (int r = 0; r < R; ++r) {
      const int64_t at = (row + r) * m.y_stride + column;
      __m512 y = sums[r][v];
      if (m.up != nullptr) y = _mm512_mul_ps(Silu(y), sums[r][v + kVectors / 2]);
      if (m.bias != nullptr) y = _mm512_add_ps(y, bias);
      if (m.residual != nullptr) y = _mm512_add_ps(y, WidenHalves(m.residual + at, mask));
      StoreHalves(m.y + at, mask, y);
    }
  }
}

template <int R>
RF_BF16_TARGET void HeadTile(const PairHead& h, const uint32_t* panel, int64_t index, int64_t row, int64_t* wanted) {
  __m512 sums[R][kVectors];
  Multiply<R>(h.x + row * h.inputs, h.inputs, panel, h.inputs, sums);
  const int64_t begin = index * kPanelOutputs, count = std::min(kPanelOutputs, h.outputs - begin);
  const int64_t panels = (h.outputs + kPanelOutputs - 1) / kPanelOutputs;
  const __m512 lowest = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int r = 0; r < R; ++r) {
    for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_mask_mov_ps(lowest, LanesBelow(count - 16 * v), sums[r][v]);
    const float highest = _mm512_reduce_max_ps(
        _mm512_max_ps(_mm512_max_ps(sums[r][0], sums[r][1]), _mm512_max_ps(sums[r][2], sums[r][3])));
    const __m512 top = _mm512_set1_ps(highest);
    __m512 total = _mm512_setzero_ps();
    uint64_t equal = 0;
    for (int v = 0; v < kVectors; ++v) {
      total = _mm512_add_ps(total, Exp(_mm512_sub_ps(sums[r][v], top)));
      equal |= static_cast<uint64_t>(_mm512_cmp_ps_mask(sums[r][v], top, _CMP_EQ_OQ)) << (16 * v);
    }
    const int first = equal == 0 ? 0 : __builtin_ctzll(equal);  // none equal: not a number, which shows in the sum
    h.tops[(row + r) * panels + index] = {highest, _mm512_reduce_add_ps(total), static_cast<int32_t>(begin + first)};
    if (*wanted < h.starts[index + 1] && h.wanted[*wanted].row == row + r) {
      alignas(64) float logits[kPanelOutputs];
      for (int v = 0; v < kVectors; ++v) _mm512_store_ps(logits + 16 * v, sums[r][v]);
      for (; *wanted < h.starts[index + 1] && h.wanted[*wanted].row == row + r; ++*wanted) {
        h.wanted[*wanted].logit = logits[h.wanted[*wanted].output - begin];
      }
    }
  }
}

// Calls Body<R>(..., row, ...) for all rows of [begin, end), at most kTileRows at once.
#define RF_FOR_ROWS(Body, begin, end, ...)                       \
  for (int64_t row = begin; row < end;) {                        \
    const int64_t left = end - row;                              \
    switch (left >= kTileRows ? kTileRows : left) {              \
      case 1: Body<1>(__VA_ARGS__); break;                       \
      case 2: Body<2>(__VA_ARGS__); break;                       \
      case 3: Body<3>(__VA_ARGS__); break;                       \
      case 4: Body<4>(__VA_ARGS__); break;                       \
      case 5: Body<5>(__VA_ARGS__); break;                       \
      default: Body<kTileRows>(__VA_ARGS__);                     \
    }                                                            \
    row += std::min<int64_t>(left, kTileRows);                   \
  }

}  // namespace

void PairMatmulUnit(const PairMatmul& m, int64_t unit, PairPanel& panel) {
  const int64_t width = PanelWidth(m), parts = RowParts(m.rows), index = unit / parts, part = unit % parts;
  const int64_t begin = index * width, count = std::min(width, m.outputs - begin);
  if (panel.weight != m.weight || panel.index != index) {
    const int vectors = m.up != nullptr ? kVectors / 2 : kVectors;
    LayRows(m.weight, m.inputs, begin, count, 0, vectors, panel.numbers);
    if (m.up != nullptr) LayRows(m.up, m.inputs, begin, count, vectors, vectors, panel.numbers);
    panel.weight = m.weight;
    panel.index = index;
  }
  const int64_t tiles = (m.rows + kTileRows - 1) / kTileRows;
  const int64_t first = tiles * part / parts * kTileRows, last = std::min(m.rows, tiles * (part + 1) / parts * kTileRows);
  RF_FOR_ROWS(Tile, first, last, m, panel.numbers, row, begin, count)
}

void PairHeadPanel(const PairHead& h, int64_t index, PairPanel& panel) {
  const int64_t begin = index * kPanelOutputs;
  LayRows(h.weight, h.inputs, begin, std::min(kPanelOutputs, h.outputs - begin), 0, kVectors, panel.numbers);
  panel.weight = nullptr;
  int64_t wanted = h.starts[index];
  RF_FOR_ROWS(HeadTile, 0, h.rows, h, panel.numbers, index, row, &wanted)
}

#else
void PairMatmulUnit(const PairMatmul&, int64_t, PairPanel&) {}
void PairHeadPanel(const PairHead&, int64_t, PairPanel&) {}
#endif

}  // namespace refinery::kernels
