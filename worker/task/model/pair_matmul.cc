#include "worker/task/model/pair_matmul.h"

#include <algorithm>
#include <limits>

#include "worker/task/model/pair_tile.h"

namespace refinery::kernels {

using simd::Bf16;

namespace {

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

// Columns [begin, begin + count) of W [inputs, outputs] as a panel; columns beyond are zero.
RF_BF16_TARGET void LayColumns(const Bf16* weight, int64_t inputs, int64_t outputs, int64_t begin, int64_t count, uint32_t* panel) {
  for (int64_t c = 0; c < inputs; c += 2, panel += kPanelOutputs) {
    const Bf16 *even = weight + c * outputs + begin, *odd = even + outputs;
    for (int v = 0; v < kVectors; ++v) {
      const __mmask16 mask = LanesBelow(count - 16 * v);
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, even + 16 * v));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, odd + 16 * v));
      _mm512_store_si512(panel + 16 * v, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
  }
}

// x / (1 + e^-x); the quotient to within two units in the last place of a float, which takes a quarter of a division's time.
RF_BF16_INLINE __m512 Silu(__m512 x) {
  // The inverse of more than e^87 would underflow.
  const __m512 below = _mm512_min_ps(_mm512_sub_ps(_mm512_setzero_ps(), x), _mm512_set1_ps(87.0f));
  const __m512 sum = _mm512_add_ps(_mm512_set1_ps(1.0f), Exp(below));
  const __m512 estimate = _mm512_rcp14_ps(sum);
  const __m512 inverse = _mm512_fmadd_ps(estimate, _mm512_fnmadd_ps(sum, estimate, _mm512_set1_ps(1.0f)), estimate);
  return _mm512_mul_ps(x, inverse);
}

// Outputs [begin, begin + count) of rows [row, row + R).
template <int R>
RF_BF16_TARGET void Tile(const PairMatmul& m, const uint32_t* panel, int64_t row, int64_t begin, int64_t count) {
  __m512 sums[R][kVectors];
  Multiply<R>(m.x + row * m.x_stride, m.x_stride, panel, m.inputs, sums);
  if (m.up != nullptr) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors / 2; ++v) {
      const __mmask16 mask = LanesBelow(count - 16 * v);
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        const __m512 y = _mm512_mul_ps(Silu(sums[r][v]), sums[r][v + kVectors / 2]);
        StoreHalves(m.y + (row + r) * m.y_stride + begin + 16 * v, mask, y);
      }
    }
    return;
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVectors; ++v) {
    const __mmask16 mask = LanesBelow(count - 16 * v);
    const int64_t column = begin + 16 * v;
    const __m512 bias = m.bias == nullptr ? _mm512_setzero_ps() : WidenHalves(m.bias + column, mask);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const int64_t at = (row + r) * m.y_stride + column;
      __m512 y = sums[r][v];
      if (m.partial != nullptr) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(mask, m.partial + at));
      if (m.y == nullptr) {
        _mm512_mask_storeu_ps(m.partial + at, mask, y);
        continue;
      }
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
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_mask_mov_ps(lowest, LanesBelow(count - 16 * v), sums[r][v]);
    const float highest = _mm512_reduce_max_ps(
        _mm512_max_ps(_mm512_max_ps(sums[r][0], sums[r][1]), _mm512_max_ps(sums[r][2], sums[r][3])));
    const __m512 top = _mm512_set1_ps(highest);
    __m512 total = _mm512_setzero_ps();
    uint64_t equal = 0;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      total = _mm512_add_ps(total, Exp(_mm512_sub_ps(sums[r][v], top)));
      equal |= static_cast<uint64_t>(_mm512_cmp_ps_mask(sums[r][v], top, _CMP_EQ_OQ)) << (16 * v);
    }
    const int first = equal == 0 ? 0 : __builtin_ctzll(equal);  // none equal: not a number, which shows in the sum
    h.tops[(row + r) * panels + index] = {highest, _mm512_reduce_add_ps(total), static_cast<int32_t>(begin + first)};
    if (*wanted < h.starts[index + 1] && h.wanted[*wanted].row == row + r) {
      alignas(64) float logits[kPanelOutputs];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) _mm512_store_ps(logits + 16 * v, sums[r][v]);
      for (; *wanted < h.starts[index + 1] && h.wanted[*wanted].row == row + r; ++*wanted) {
        h.wanted[*wanted].logit = logits[h.wanted[*wanted].output - begin];
      }
    }
  }
}

}  // namespace

void PairMatmulUnit(const PairMatmul& m, int64_t unit, PairPanel& panel) {
  const int64_t width = PanelWidth(m), parts = RowParts(m.rows), index = unit / parts, part = unit % parts;
  const int64_t begin = index * width, count = std::min(width, m.outputs - begin);
  if (panel.weight != m.weight || panel.index != index) {
    const int vectors = m.up != nullptr ? kVectors / 2 : kVectors;
    if (m.by_inputs) {
      LayColumns(m.weight, m.inputs, m.outputs, begin, count, panel.numbers);
    } else {
      LayRows(m.weight, m.inputs, begin, count, 0, vectors, panel.numbers);
    }
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
