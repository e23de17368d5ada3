#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include "worker/task/export/stored_size.h"

#include <algorithm>

#include "worker/task/quantize/mixed_bits.h"
#include "worker/task/quantize/prepared_hessian.h"

namespace refinery::exporting {
namespace {

constexpr int64_t kBlock = 32;  // weights of a block
constexpr int64_t kQ4_0Bytes = 18, kQ4_1Bytes = 20, kQ8_0Bytes = 34;
constexpr int64_t kPlainBytes = 2;
constexpr int64_t kShapeBytes = 16;  // weight_shape of compressed-tensors

int64_t GgufBytes(QuantSettings settings, int64_t out, int64_t in, int64_t bits) {
  settings.bits = bits;
  settings.mixed.clear();
  settings.group_size = quantize::ResolveGroupSize(settings.group_size, in);
  if (!GgufBlockProblem(settings).empty()) return out * in * kPlainBytes;
  return out * (in / kBlock) * (bits == 8 ? kQ8_0Bytes : settings.symmetric ? kQ4_0Bytes : kQ4_1Bytes);
}

int64_t CompressedTensorsBytes(const QuantSettings& settings, int64_t out, int64_t in, int64_t bits) {
  const int64_t size = quantize::ResolveGroupSize(settings.group_size, in), groups = (in + size - 1) / size;
  return (out * in * bits + out * groups * (settings.symmetric ? 16 : 16 + bits)) / 8 + kShapeBytes;
}

}  // namespace

int64_t StoredBytes(Format format, const QuantSettings& settings, int64_t out, int64_t in, int64_t bits) {
  switch (format) {
    case Format::kGguf: return GgufBytes(settings, out, in, bits);
    case Format::kCompressedTensors: return CompressedTensorsBytes(settings, out, in, std::max<int64_t>(bits, 4));
    case Format::kGptq:
    case Format::kGptqV2: return quantize::ModuleBytes(out, in, bits, settings.group_size);
  }
  return 0;
}

int64_t LargestStoredBytes(const std::vector<Format>& formats, const QuantSettings& settings, int64_t out, int64_t in, int64_t bits) {
  int64_t most = formats.empty() ? StoredBytes(Format::kGptq, settings, out, in, bits) : 0;
  for (const Format format : formats) most = std::max(most, StoredBytes(format, settings, out, in, bits));
  return most;
}

}  // namespace refinery::exporting
