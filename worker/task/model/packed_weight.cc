#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <ATen/Parallel.h>

#include "worker/task/model/packed_kernels.h"
#include "worker/task/model/packed_weight.h"

namespace refinery::model {

int64_t PackedWeight::bytes() const {
  return static_cast<int64_t>(codes.nbytes() + scales.nbytes() + (offsets.defined() ? offsets.nbytes() : 0));
}

bool PackedWeight::Takes(const checkpoint::GptqTensors& tensors, const checkpoint::GptqFormat& format) {
  if (format.group_size > 0 && format.group_size % kGroupUnit != 0) return false;
  if (!tensors.g_idx.defined() || format.group_size <= 0) return true;
  const at::Tensor in_order = at::arange(tensors.g_idx.size(0), at::kInt).floor_divide_(format.group_size);
  return at::equal(tensors.g_idx, in_order);
}

StatusOr<std::shared_ptr<const PackedWeight>> PackedWeight::Pack(const checkpoint::GptqTensors& tensors,
                                                                 const checkpoint::GptqFormat& format, WeightArena& arena) {
  RF_ASSIGN_OR_RETURN(const checkpoint::GptqCodes unpacked, checkpoint::UnpackGptq(tensors, format));
  const at::Tensor offsets = (int64_t{1} << (format.bits - 1)) - unpacked.zeros.to(at::kFloat);
  const int64_t inputs = unpacked.codes.size(1);
  return FromCodes(unpacked.codes, tensors.scales.t(), offsets.eq(0).all().item<bool>() ? at::Tensor() : offsets, format.bits,
                   format.group_size > 0 ? format.group_size : (inputs + kChunk - 1) / kChunk * kChunk, arena);
}

std::shared_ptr<const PackedWeight> PackedWeight::FromCodes(const at::Tensor& codes, const at::Tensor& scales,
                                                            const at::Tensor& offsets, int64_t bits, int64_t group_size,
                                                            WeightArena& arena) {
  TORCH_CHECK(group_size % kGroupUnit == 0, "groups of ", group_size, " inputs cannot be packed");
  auto packed = std::make_shared<PackedWeight>();
  packed->outputs = codes.size(0);
  packed->inputs = codes.size(1);
  packed->bits = bits;
  packed->group_size = group_size;
  packed->scales = arena.Empty({packed->outputs, packed->groups()}, at::kHalf).copy_(scales);
  if (offsets.defined()) packed->offsets = offsets.contiguous();
  const int64_t inputs = packed->inputs, chunks = packed->chunks(), planes = packed->planes();
  packed->codes = arena.Empty({packed->outputs, chunks * planes * kPlaneBytes}, at::kByte).zero_();
  const at::Tensor source = codes.contiguous();
  const uint8_t* from = source.const_data_ptr<uint8_t>();
  uint8_t* to = packed->codes.data_ptr<uint8_t>();
  at::parallel_for(0, packed->outputs, 16, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      for (int64_t i = 0; i < inputs; ++i) {
        const int64_t place = i % kChunk;
        uint8_t* cell = to + (o * chunks + i / kChunk) * planes * kPlaneBytes + place % 32;
        const int shift = place < 32 ? 0 : 4;
        for (int64_t plane = 0; plane < planes; ++plane) {
          cell[plane * kPlaneBytes] |= static_cast<uint8_t>(((from[o * inputs + i] >> (4 * plane)) & 15) << shift);
        }
      }
    }
  });
  return packed;
}

at::Tensor PackedWeight::Expand(at::ScalarType dtype) const {
  const at::ScalarType made = dtype == at::kBFloat16 ? at::kBFloat16 : at::kFloat;
  const at::Tensor weight = at::empty({outputs, inputs}, made), wide = scales.to(at::kFloat);
  const auto centre = static_cast<double>(int64_t{1} << (bits - 1));
  const at::Tensor adds = offsets.defined() ? offsets - centre : at::full({outputs, groups()}, -centre, at::kFloat);
  const kernels::PackedRows rows{codes.const_data_ptr<uint8_t>(), wide.const_data_ptr<float>(), adds.const_data_ptr<float>(), inputs,
                                 group_size, static_cast<int>(planes())};
  at::parallel_for(0, outputs, 16, [&](int64_t begin, int64_t end) {
    if (made == at::kBFloat16) {
      kernels::ExpandRows(rows, static_cast<simd::Bf16*>(weight.data_ptr()), begin, end);
    } else {
      kernels::ExpandRows(rows, weight.data_ptr<float>(), begin, end);
    }
  });
  return weight.to(dtype);
}

}  // namespace refinery::model
