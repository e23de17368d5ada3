#include "worker/task/runtime/torch.h"
//
#include "worker/task/checkpoint/gptq_weights.h"

#include <vector>

namespace refinery::checkpoint {
namespace {

// Field `index` of a little-endian bit stream whose consecutive words are `stride` apart. Fields of 2, 4 and 8 bits
// never cross a word; those of 3 bits may.
uint32_t Field(const uint32_t* words, int64_t stride, int64_t index, int64_t bits) {
  int64_t bit = index * bits;
  int64_t word = bit / 32, shift = bit % 32;
  uint64_t value = words[word * stride] >> shift;
  if (shift + bits > 32) value |= uint64_t{words[(word + 1) * stride]} << (32 - shift);
  return static_cast<uint32_t>(value & ((uint64_t{1} << bits) - 1));
}

Status CheckShapes(const GptqTensors& t, const GptqFormat& format) {
  if (t.qweight.dim() != 2 || t.qzeros.dim() != 2 || t.scales.dim() != 2)
    return DataLoss("qweight, qzeros and scales must be matrices");
  if (t.qweight.scalar_type() != at::kInt || t.qzeros.scalar_type() != at::kInt || !t.scales.is_floating_point())
    return DataLoss("qweight and qzeros must be int32, scales floating point");
  int64_t in = t.qweight.size(0) * 32 / format.bits, out = t.qweight.size(1), groups = t.scales.size(0);
  if (t.qweight.size(0) * 32 % format.bits != 0) return DataLoss("qweight does not hold whole codes");
  if (in == 0 || out == 0 || groups == 0) return DataLoss("a tensor is empty");
  if (t.scales.size(1) != out || t.qzeros.size(0) != groups || t.qzeros.size(1) * 32 != out * format.bits)
    return DataLoss("the shapes of qweight ", t.qweight.size(0), "x", out, ", qzeros ", t.qzeros.size(0), "x",
                    t.qzeros.size(1), " and scales ", groups, "x", t.scales.size(1), " contradict each other");
  int64_t group_size = format.group_size > 0 ? format.group_size : in;
  if (groups != (in + group_size - 1) / group_size)
    return DataLoss(groups, " groups of scales do not fit ", in, " inputs in groups of ", group_size);
  if (t.g_idx.defined() && (t.g_idx.dim() != 1 || t.g_idx.size(0) != in || t.g_idx.scalar_type() != at::kInt))
    return DataLoss("g_idx must be one int32 per input");
  return absl::OkStatus();
}

}  // namespace

StatusOr<GptqCodes> UnpackGptq(const GptqTensors& tensors, const GptqFormat& format) {
  RF_RETURN_IF_ERROR(CheckShapes(tensors, format));
  const int64_t bits = format.bits, out = tensors.qweight.size(1), groups = tensors.scales.size(0);
  const int64_t in = tensors.qweight.size(0) * 32 / bits;
  const at::Tensor qweight = tensors.qweight.contiguous(), qzeros = tensors.qzeros.contiguous();
  GptqCodes result{.codes = at::empty({out, in}, at::kByte), .zeros = at::empty({out, groups}, at::kInt)};
  const auto* words = reinterpret_cast<const uint32_t*>(qweight.const_data_ptr<int32_t>());
  const auto* zeros = reinterpret_cast<const uint32_t*>(qzeros.const_data_ptr<int32_t>());
  auto* codes = result.codes.data_ptr<uint8_t>();
  auto* zero_of = result.zeros.data_ptr<int32_t>();
  const int64_t zero_words = qzeros.size(1);
  const uint32_t mask = (uint32_t{1} << bits) - 1;
  at::parallel_for(0, out, 16, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      for (int64_t g = 0; g < groups; ++g) {
        const uint32_t stored = Field(zeros + g * zero_words, 1, o, bits);
        // v1 readers add one within the field: a stored 2^bits - 1 stands for zero.
        zero_of[o * groups + g] = static_cast<int32_t>(format.zeros_minus_one ? (stored + 1) & mask : stored);
      }
      for (int64_t i = 0; i < in; ++i) codes[o * in + i] = static_cast<uint8_t>(Field(words + o, out, i, bits));
    }
  });
  return result;
}

StatusOr<at::Tensor> DequantizeGptq(const GptqTensors& tensors, const GptqFormat& format) {
  RF_ASSIGN_OR_RETURN(const GptqCodes unpacked, UnpackGptq(tensors, format));
  const int64_t out = unpacked.codes.size(0), in = unpacked.codes.size(1), groups = unpacked.zeros.size(1);
  const int64_t group_size = format.group_size > 0 ? format.group_size : in;
  std::vector<int64_t> group_of(static_cast<size_t>(in));
  const at::Tensor g_idx = tensors.g_idx.defined() ? tensors.g_idx.contiguous() : at::Tensor();
  for (int64_t i = 0; i < in; ++i) {
    const int64_t group = g_idx.defined() ? g_idx.const_data_ptr<int32_t>()[i] : i / group_size;
    if (group < 0 || group >= groups) return DataLoss("g_idx[", i, "] is ", group, " of ", groups, " groups");
    group_of[static_cast<size_t>(i)] = group;
  }
  const at::Tensor scales = tensors.scales.to(at::kFloat).contiguous(), weight = at::empty({out, in}, at::kFloat);
  const auto* codes = unpacked.codes.const_data_ptr<uint8_t>();
  const auto* zeros = unpacked.zeros.const_data_ptr<int32_t>();
  const float* scale = scales.const_data_ptr<float>();
  float* result = weight.data_ptr<float>();
  at::parallel_for(0, out, 16, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin; o < end; ++o) {
      for (int64_t i = 0; i < in; ++i) {
        const int64_t g = group_of[static_cast<size_t>(i)];
        result[o * in + i] = scale[g * out + o] * static_cast<float>(codes[o * in + i] - zeros[o * groups + g]);
      }
    }
  });
  return weight;
}

}  // namespace refinery::checkpoint
