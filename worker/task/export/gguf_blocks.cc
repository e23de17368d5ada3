#include "worker/task/runtime/torch.h"

#include "worker/task/export/gguf_blocks.h"

#include <cmath>

#include "worker/task/checkpoint/gguf_writer.h"

namespace refinery::exporting {
namespace {

constexpr int64_t kBlock = 32, kHalf = 16;

// A block in bytes: scale, minimum of Q4_1, values.
struct Form {
  int64_t header = 2, values = kHalf;
  int64_t bytes() const { return header + values; }
};

Form FormOf(uint32_t type) {
  switch (type) {
    case checkpoint::kGgufQ4_0: return {};
    case checkpoint::kGgufQ4_1: return {.header = 4};
    case checkpoint::kGgufQ8_0: return {.values = kBlock};
    default: TORCH_CHECK(false, "tensor type ", type, " is not one that codes are written as");
  }
}

}  // namespace

bool HasBlocks(const quantize::QuantizedLinear& linear) {
  if (linear.group_index.defined() || linear.group_size % kBlock != 0 || linear.codes.size(1) % kBlock != 0) return false;
  return linear.bits == 4 || (linear.bits == 8 && !linear.zeros.defined());
}

uint32_t PlainType(const quantize::QuantizedLinear& linear) {
  constexpr double kLargestHalf = 65504;
  const double largest = linear.scales.abs().max().item<double>() * static_cast<double>((int64_t{1} << linear.bits) - 1);
  return largest <= kLargestHalf ? checkpoint::kGgufF16 : checkpoint::kGgufBf16;
}

uint32_t BlockType(const quantize::QuantizedLinear& linear) {
  TORCH_CHECK(!linear.group_index.defined(), "blocks hold columns in their order");
  TORCH_CHECK(linear.group_size % kBlock == 0 && linear.codes.size(1) % kBlock == 0, "groups must span whole blocks, not ",
              linear.group_size);
  if (linear.bits == 8) {
    TORCH_CHECK(!linear.zeros.defined(), "Q8_0 has no zero points");
    return checkpoint::kGgufQ8_0;
  }
  TORCH_CHECK(linear.bits == 4, "no block type for ", linear.bits, " bits");
  return linear.zeros.defined() ? checkpoint::kGgufQ4_1 : checkpoint::kGgufQ4_0;
}

at::Tensor BlockMinimums(const quantize::QuantizedLinear& linear) {
  // 0 - x, not -x: a zero point of 0 gives +0.
  return (0 - linear.zeros.cpu().to(at::kFloat) * linear.scales.cpu().to(at::kFloat)).to(at::kHalf).contiguous();
}

at::Tensor EncodeBlocks(const quantize::QuantizedLinear& linear) {
  const uint32_t type = BlockType(linear);
  const Form form = FormOf(type);
  const at::Tensor codes = linear.codes.cpu().contiguous(), scales = linear.scales.cpu().to(at::kHalf).contiguous();
  const at::Tensor minimums = type == checkpoint::kGgufQ4_1 ? BlockMinimums(linear) : scales;
  const int64_t out = codes.size(0), in = codes.size(1), groups = scales.size(1), blocks = in / kBlock;
  const int64_t blocks_per_group = linear.group_size / kBlock;
  at::Tensor rows = at::empty({out, blocks * form.bytes()}, at::kByte);
  const auto* q = codes.const_data_ptr<uint8_t>();
  const auto *d = scales.const_data_ptr<at::Half>(), *m = minimums.const_data_ptr<at::Half>();
  auto* target = rows.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, out, 16, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin * blocks; b < end * blocks; ++b) {
      uint8_t* block = target + b * form.bytes();
      const int64_t group = b / blocks * groups + b % blocks / blocks_per_group;
      std::memcpy(block, d + group, 2);
      if (type == checkpoint::kGgufQ4_1) std::memcpy(block + 2, m + group, 2);
      const uint8_t* values = q + b * kBlock;
      uint8_t* bytes = block + form.header;
      if (type == checkpoint::kGgufQ8_0) {
        for (int64_t i = 0; i < kBlock; ++i) bytes[i] = values[i] ^ 0x80;  // code - 128 in two's complement
      } else {
        for (int64_t i = 0; i < kHalf; ++i) bytes[i] = static_cast<uint8_t>(values[i] | values[i + kHalf] << 4);
      }
    }
  });
  return rows;
}

BlockCodes DecodeBlocks(const at::Tensor& rows, uint32_t type) {
  const Form form = FormOf(type);
  const at::Tensor source = rows.contiguous();
  TORCH_CHECK(source.size(1) % form.bytes() == 0, "rows do not hold whole blocks");
  const at::Tensor blocks = source.view({source.size(0), source.size(1) / form.bytes(), form.bytes()});
  const at::Tensor bytes = blocks.narrow(2, form.header, form.values);
  BlockCodes result;
  result.scales = blocks.narrow(2, 0, 2).contiguous().view(at::kHalf).squeeze(2);
  if (type == checkpoint::kGgufQ4_1) result.minimums = blocks.narrow(2, 2, 2).contiguous().view(at::kHalf).squeeze(2);
  result.codes = type == checkpoint::kGgufQ8_0 ? bytes.bitwise_xor(0x80)
                                               : at::cat({bytes.bitwise_and(0x0F), bytes.bitwise_right_shift(4)}, 2);
  result.codes = result.codes.reshape({source.size(0), -1}).contiguous();
  return result;
}

at::Tensor RoundToQ8_0(const at::Tensor& weights) {
  const at::Tensor source = weights.to(at::kFloat).cpu().contiguous();
  const int64_t rows = source.size(0), blocks = source.size(1) / kBlock;
  TORCH_CHECK(source.size(1) % kBlock == 0, "rows do not divide into blocks");
  const Form form = FormOf(checkpoint::kGgufQ8_0);
  at::Tensor result = at::empty({rows, blocks * form.bytes()}, at::kByte);
  const float* x = source.const_data_ptr<float>();
  auto* target = result.mutable_data_ptr<uint8_t>();
  at::parallel_for(0, rows, 64, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin * blocks; b < end * blocks; ++b) {
      float largest = 0;
      for (int64_t i = 0; i < kBlock; ++i) largest = std::max(largest, std::abs(x[b * kBlock + i]));
      const float scale = largest / 127.0f, inverse = scale == 0 ? 0.0f : 1.0f / scale;
      const at::Half stored = scale;
      uint8_t* block = target + b * form.bytes();
      std::memcpy(block, &stored, 2);
      for (int64_t i = 0; i < kBlock; ++i)
        block[2 + i] = static_cast<uint8_t>(static_cast<int8_t>(std::round(x[b * kBlock + i] * inverse)));
    }
  });
  return result;
}

at::Tensor InterleavedOrder(int64_t rows, int64_t heads) {
  TORCH_CHECK(rows % (2 * heads) == 0, rows, " rows do not divide into ", heads, " heads");
  const int64_t half = rows / heads / 2;
  return at::arange(rows, at::kLong).view({heads, 2, half}).transpose(1, 2).reshape({rows}).contiguous();
}

}  // namespace refinery::exporting
