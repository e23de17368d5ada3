#include "worker/task/model/pair_gram.h"

#include <algorithm>

#include "worker/task/model/pair_tile.h"

namespace refinery::kernels {
namespace {

constexpr int64_t kStrip = kPanelOutputs;  // columns
constexpr int64_t kUnitRows = 96;          // whole tiles

// Columns of X that meet the columns of a strip on or above the diagonal.
int64_t RowsOf(int64_t strip, int64_t columns) { return std::min(columns, (strip + 1) * kStrip); }
int64_t PartsOf(int64_t strip, int64_t columns) { return (RowsOf(strip, columns) + kUnitRows - 1) / kUnitRows; }

}  // namespace

int64_t PairGramStrips(int64_t columns) { return (columns + kStrip - 1) / kStrip; }

int64_t PairGramNumbers(int64_t tokens, int64_t columns) { return (tokens + 31) / 32 * 16 * PairGramStrips(columns) * kStrip; }

int64_t PairGramUnits(int64_t columns) {
  int64_t units = 0;
  for (int64_t strip = 0; strip < PairGramStrips(columns); ++strip) units += PartsOf(strip, columns);
  return units;
}

#if defined(__x86_64__)
namespace {

// Token pairs of a chunk, whole vectors.
int64_t PairsOf(const PairGram& g) { return (g.tokens + 31) / 32 * 16; }

// 16 columns of 16 token pairs: as they lie into the panel, transposed into the rows.
RF_BF16_TARGET void PackSquare(const PairGram& g, int64_t pair, int64_t column, uint32_t* panel, uint32_t* rows, int64_t stride) {
  const auto mask = static_cast<__mmask16>(LanesBelow(g.columns - column));
  __m512i square[16];
  for (int64_t i = 0; i < 16; ++i) {
    const int64_t token = 2 * (pair + i);
    const Bf16* from = g.x + token * g.x_stride + column;
    const __m512i low = token < g.tokens ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)) : _mm512_setzero_si512();
    const __m512i high =
        token + 1 < g.tokens ? _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + g.x_stride)) : _mm512_setzero_si512();
    square[i] = _mm512_or_si512(low, _mm512_slli_epi32(high, 16));
    _mm512_store_si512(panel + i * kPanelOutputs, square[i]);
  }
  Transpose(square);
  for (int64_t i = 0; i < 16; ++i) _mm512_store_si512(rows + i * stride, square[i]);
}

// upper[row .. row + R)[begin .. begin + count) += rows times panel.
template <int R>
RF_BF16_TARGET void GramTile(const PairGram& g, const uint32_t* panel, int64_t row, int64_t begin, int64_t count) {
  const int64_t inputs = 2 * PairsOf(g);
  __m512 sums[R][kVectors];
  Multiply<R>(reinterpret_cast<const Bf16*>(g.rows) + row * inputs, inputs, panel, inputs, sums);
  for (int r = 0; r < R; ++r) {
    float* to = g.upper + (row + r) * g.columns + begin;
    for (int v = 0; v < kVectors; ++v) {
      const __mmask16 mask = LanesBelow(count - 16 * v);
      _mm512_mask_storeu_ps(to + 16 * v, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to + 16 * v), sums[r][v]));
    }
  }
}

}  // namespace

void PackPairGram(const PairGram& g, int64_t strip) {
  const int64_t pairs = PairsOf(g);
  uint32_t* panel = g.panels + strip * pairs * kStrip;
  uint32_t* rows = g.rows + strip * kStrip * pairs;
  for (int64_t pair = 0; pair < pairs; pair += 16) {
    for (int64_t c = 0; c < kStrip; c += 16) {
      PackSquare(g, pair, strip * kStrip + c, panel + pair * kStrip + c, rows + c * pairs + pair, pairs);
    }
  }
}

void PairGramUnit(const PairGram& g, int64_t unit) {
  int64_t strip = 0;
  while (unit >= PartsOf(strip, g.columns)) unit -= PartsOf(strip++, g.columns);
  const uint32_t* panel = g.panels + strip * PairsOf(g) * kStrip;
  const int64_t begin = strip * kStrip, count = std::min(kStrip, g.columns - begin);
  const int64_t first = unit * kUnitRows, last = std::min(first + kUnitRows, RowsOf(strip, g.columns));
  RF_FOR_ROWS(GramTile, first, last, g, panel, row, begin, count)
}

#else
void PackPairGram(const PairGram&, int64_t) {}
void PairGramUnit(const PairGram&, int64_t) {}
#endif

}  // namespace refinery::kernels
