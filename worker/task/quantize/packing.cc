// Codes in the layout of HF GPTQ v1 (docs/formats.md): dense little-endian bit streams of 32 values in `bits` words, along `in`
// for qweight and along `out` for qzeros. For 2, 4 and 8 bits that is the same as 32 / bits whole values in each word; for 3
// bits values 10 and 21 straddle words.

#include "worker/task/runtime/torch.h"

#include "common/status.h"
#include "worker/task/quantize/gptq.h"

namespace refinery::quantize {
namespace {

constexpr int64_t kRun = 32;  // values that fill a whole number of words at every width

// values [runs * 32, lanes] -> words [runs * bits, lanes].
at::Tensor PackRuns(const at::Tensor& values, int64_t bits) {
  const at::Tensor source = values.to(at::kByte).contiguous();
  const int64_t runs = source.size(0) / kRun, lanes = source.size(1);
  at::Tensor words = at::zeros({runs * bits, lanes}, at::kInt);
  const uint8_t* in = source.const_data_ptr<uint8_t>();
  auto* out = reinterpret_cast<uint32_t*>(words.data_ptr<int32_t>());
  at::parallel_for(0, runs, 1, [&](int64_t first, int64_t last) {
    for (int64_t run = first; run < last; ++run) {
      for (int64_t v = 0; v < kRun; ++v) {
        const int64_t bit = v * bits, word = bit / 32, shift = bit % 32;
        const uint8_t* row = in + (run * kRun + v) * lanes;
        uint32_t* low = out + (run * bits + word) * lanes;
        const bool straddles = shift + bits > 32;
        for (int64_t lane = 0; lane < lanes; ++lane) {
          low[lane] |= static_cast<uint32_t>(row[lane]) << shift;
          if (straddles) low[lanes + lane] |= static_cast<uint32_t>(row[lane]) >> (32 - shift);
        }
      }
    }
  });
  return words;
}

// The inverse: words [runs * bits, lanes] -> values [runs * 32, lanes] uint8.
at::Tensor UnpackRuns(const at::Tensor& packed, int64_t bits) {
  const at::Tensor source = packed.to(at::kInt).contiguous();
  TORCH_CHECK(source.size(0) % bits == 0, "packed tensor of ", source.size(0), " words is not a multiple of ", bits);
  const int64_t runs = source.size(0) / bits, lanes = source.size(1);
  at::Tensor values = at::empty({runs * kRun, lanes}, at::kByte);
  const auto* in = reinterpret_cast<const uint32_t*>(source.const_data_ptr<int32_t>());
  auto* out = values.data_ptr<uint8_t>();
  const uint32_t mask = (uint32_t{1} << bits) - 1;
  at::parallel_for(0, runs, 1, [&](int64_t first, int64_t last) {
    for (int64_t run = first; run < last; ++run) {
      for (int64_t v = 0; v < kRun; ++v) {
        const int64_t bit = v * bits, word = bit / 32, shift = bit % 32;
        const uint32_t* low = in + (run * bits + word) * lanes;
        const bool straddles = shift + bits > 32;
        uint8_t* row = out + (run * kRun + v) * lanes;
        for (int64_t lane = 0; lane < lanes; ++lane) {
          uint32_t value = low[lane] >> shift;
          if (straddles) value |= low[lanes + lane] << (32 - shift);
          row[lane] = static_cast<uint8_t>(value & mask);
        }
      }
    }
  });
  return values;
}

// `offset`: what is added to a zero point before it is stored.
PackedGptq Pack(const QuantizedLinear& linear, int64_t offset) {
  const int64_t out = linear.codes.size(0), in = linear.codes.size(1), groups = linear.scales.size(1);
  TORCH_CHECK(out % kRun == 0 && in % kRun == 0, "GPTQ packs multiples of 32, not ", linear.codes.sizes());
  at::Tensor zeros = at::full({out, groups}, int64_t{1} << (linear.bits - 1), at::kInt);
  if (linear.zeros.defined()) zeros = linear.zeros.cpu().to(at::kInt);
  zeros = zeros + offset;
  TORCH_CHECK(zeros.min().item<int>() >= 0, "GPTQ v1 cannot store a zero point of 0");
  PackedGptq packed;
  packed.qweight = PackRuns(linear.codes.cpu().t(), linear.bits);
  packed.qzeros = PackRuns(zeros, linear.bits).t().contiguous();
  packed.scales = linear.scales.cpu().t().to(at::kHalf).contiguous();
  packed.g_idx = linear.group_index.defined()
                     ? linear.group_index.cpu().to(at::kInt).contiguous()
                     : at::arange(in, at::kInt).floor_divide(linear.group_size).to(at::kInt);
  return packed;
}

// The zero points [out, groups] uint8; v1 stores them minus one and wraps within the field, as its readers do.
at::Tensor Zeros(const PackedGptq& packed, const PackedLayout& layout) {
  const at::Tensor stored = UnpackRuns(packed.qzeros.t(), layout.bits).to(at::kInt);
  return stored.add_(layout.version == 1 ? 1 : 0).bitwise_and_((1 << layout.bits) - 1).to(at::kByte);
}

}  // namespace

PackedGptq PackGptqV1(const QuantizedLinear& linear) { return Pack(linear, -1); }

PackedGptq PackGptqV2(const QuantizedLinear& linear) { return Pack(linear, 0); }

std::string PackedProblem(const PackedGptq& packed, const PackedLayout& layout) {
  const int64_t bits = layout.bits, group_size = layout.group_size;
  if (packed.qweight.dim() != 2 || packed.qzeros.dim() != 2 || packed.scales.dim() != 2 || packed.g_idx.dim() != 1) {
    return "a tensor has the wrong number of dimensions";
  }
  if (packed.qweight.scalar_type() != at::kInt || packed.qzeros.scalar_type() != at::kInt ||
      packed.scales.scalar_type() != at::kHalf || packed.g_idx.scalar_type() != at::kInt) {
    return "qweight, qzeros and g_idx must be int32 and scales float16";
  }
  const int64_t in = packed.g_idx.size(0), out = packed.qweight.size(1);
  if (in == 0 || out == 0 || in % kRun != 0 || out % kRun != 0 || packed.qweight.size(0) != in / kRun * bits) {
    return Join("qweight [", packed.qweight.size(0), ", ", out, "] does not fit ", in, " inputs of ", bits, " bits");
  }
  const int64_t size = group_size <= 0 ? in : group_size;
  const int64_t groups = (in + size - 1) / size;
  if (packed.scales.size(0) != groups || packed.scales.size(1) != out) {
    return Join("scales [", packed.scales.size(0), ", ", packed.scales.size(1), "] do not fit ", groups, " groups of ", out);
  }
  if (packed.qzeros.size(0) != groups || packed.qzeros.size(1) != out / kRun * bits) {
    return Join("qzeros [", packed.qzeros.size(0), ", ", packed.qzeros.size(1), "] do not fit ", groups, " groups of ", out);
  }
  if (layout.symmetric && !Zeros(packed, layout).eq(int64_t{1} << (bits - 1)).all().item<bool>()) {
    return "qzeros do not hold the symmetric zero point";
  }
  if (layout.natural_groups && !at::equal(packed.g_idx, at::arange(in, at::kInt).floor_divide(size).to(at::kInt))) {
    return "g_idx is not in order";
  }
  if (packed.g_idx.min().item<int>() < 0 || packed.g_idx.max().item<int>() >= groups) return Join("g_idx names more than ", groups, " groups");
  if (!at::isfinite(packed.scales).all().item<bool>()) return "a scale is not finite";
  return "";
}

QuantizedLinear UnpackGptq(const PackedGptq& packed, const PackedLayout& layout) {
  const std::string problem = PackedProblem(packed, layout);
  TORCH_CHECK(problem.empty(), problem);
  QuantizedLinear linear{.codes = UnpackRuns(packed.qweight, layout.bits).t().contiguous(), .scales = packed.scales.t().contiguous(),
                         .bits = layout.bits, .group_size = layout.group_size <= 0 ? packed.g_idx.size(0) : layout.group_size};
  if (!layout.symmetric) linear.zeros = Zeros(packed, layout);
  if (!layout.natural_groups) linear.group_index = packed.g_idx.clone();
  return linear;
}

std::string PackedProblem(const PackedGptq& packed, int64_t bits, int64_t group_size) {
  return PackedProblem(packed, PackedLayout{.bits = bits, .group_size = group_size});
}

QuantizedLinear UnpackGptqV1(const PackedGptq& packed, int64_t bits, int64_t group_size) {
  return UnpackGptq(packed, {.bits = bits, .group_size = group_size});
}

}  // namespace refinery::quantize
