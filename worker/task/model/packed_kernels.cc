#include "worker/task/model/packed_kernels.h"

#include <algorithm>

#include "worker/task/model/simd.h"

namespace refinery::kernels {
namespace {

using namespace refinery::simd;  // NOLINT(google-build-using-namespace): the vocabulary of this file

constexpr int64_t kChunk = 64, kHalf = 32;
using Bytes = uint8_t __attribute__((vector_size(16)));

RF_INLINE Words LoadBytes(const uint8_t* p) {
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof(bytes));
  return __builtin_convertvector(bytes, Words);
}

template <typename T>
RF_INLINE void ExpandRowsBody(const PackedRows& p, T* out, int64_t begin, int64_t end) {
  const int64_t chunks = (p.inputs + kChunk - 1) / kChunk, groups = (p.inputs + p.group_size - 1) / p.group_size;
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t i = 0; i < p.inputs; i += kHalf) {  // 32 inputs lie in one half of a chunk's bytes, and in one group
      const uint8_t* cell = p.codes + (row * chunks + i / kChunk) * p.planes * kHalf;
      const uint32_t shift = i % kChunk == 0 ? 0 : 4;
      const float scale = p.scales[row * groups + i / p.group_size], add = p.adds[row * groups + i / p.group_size];
      T* to = out + row * p.inputs + i;
      for (int64_t j = 0; j < std::min(kHalf, p.inputs - i); j += kLanes) {
        Words codes = (LoadBytes(cell + j) >> shift) & 15u;
        if (p.planes == 2) codes |= ((LoadBytes(cell + kHalf + j) >> shift) & 15u) << 4;
        const Floats weights = scale * (__builtin_convertvector(reinterpret_cast<Ints>(codes), Floats) + add);
        const int64_t left = p.inputs - i - j;
        if (left >= kLanes) {
          Store(to + j, weights);
        } else {
          for (int64_t n = 0; n < left; ++n) Assign(to + j + n, weights[n]);
        }
      }
    }
  }
}

RF_CPU_CLONES void ExpandRowsClones(const PackedRows& p, float* out, int64_t begin, int64_t end) { ExpandRowsBody(p, out, begin, end); }
RF_CPU_CLONES void ExpandRowsClones(const PackedRows& p, Bf16* out, int64_t begin, int64_t end) { ExpandRowsBody(p, out, begin, end); }

}  // namespace

template <>
void ExpandRows<float>(const PackedRows& packed, float* out, int64_t begin, int64_t end) {
  ExpandRowsClones(packed, out, begin, end);
}
template <>
void ExpandRows<Bf16>(const PackedRows& packed, Bf16* out, int64_t begin, int64_t end) {
  ExpandRowsClones(packed, out, begin, end);
}

}  // namespace refinery::kernels
