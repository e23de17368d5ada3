#include "worker/task/runtime/torch.h"

#include "worker/task/quantize/hessian.h"

#include <ATen/native/CPUBlas.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "worker/task/quantize/pair_packing.h"

namespace refinery::quantize {
namespace {

constexpr int64_t kBlock = 192;              // columns of one product
constexpr int64_t kChunkTokens = 512;        // bfloat16: rows packed at a time, so that both copies stay in cache
constexpr int64_t kFloatChunkTokens = 4096;  // otherwise: rows turned to float32 at a time

// oneDNN's small-matrix kernels sum bfloat16 products in float32 (AVX512-BF16 or AMX), several times the speed of float32
// products; at::mm would round each chunk's sum to bfloat16.
bool HasBFloat16Products() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

// One chunk in the two layouts of those kernels (pair_packing.h).
struct PackedChunk {
  int64_t tokens = 0;                    // even
  std::vector<at::BFloat16> transposed;  // [columns, tokens]
  std::vector<at::BFloat16> pairs;       // [tokens / 2, columns, 2]
};

uint32_t* Words(std::vector<at::BFloat16>& values) { return reinterpret_cast<uint32_t*>(values.data()); }

// upper += x^T x, on and above the block diagonal.
void AddBFloat16(const at::Tensor& inputs, at::Tensor& upper) {
  const at::Tensor x = inputs.contiguous();
  const int64_t columns = x.size(1);
  std::vector<std::pair<int64_t, int64_t>> products;
  for (int64_t i = 0; i < columns; i += kBlock) {
    for (int64_t j = i; j < columns; j += kBlock) products.emplace_back(i, j);
  }
  PackedChunk chunk;
  float* sums = upper.data_ptr<float>();
  for (int64_t first = 0; first < x.size(0); first += kChunkTokens) {
    const int64_t tokens = std::min(kChunkTokens, x.size(0) - first);
    chunk.tokens = (tokens + 1) / 2 * 2;
    chunk.pairs.resize(chunk.tokens * columns);
    chunk.transposed.resize(chunk.tokens * columns);
    const auto* rows = reinterpret_cast<const uint16_t*>(x.const_data_ptr<at::BFloat16>()) + first * columns;
    at::parallel_for(0, PairStrips(columns), 1, [&](int64_t begin, int64_t end) {
      for (int64_t strip = begin; strip < end; ++strip) {
        PackPairStrip({.rows = rows, .tokens = tokens, .columns = columns, .pairs = Words(chunk.pairs),
                       .transposed = Words(chunk.transposed)}, strip);
      }
    });
    at::parallel_for(0, static_cast<int64_t>(products.size()), 1, [&](int64_t begin, int64_t end) {
      for (int64_t p = begin; p < end; ++p) {
        const auto [i, j] = products[p];
        at::native::cpublas::brgemm(std::min(kBlock, columns - i), std::min(kBlock, columns - j), chunk.tokens, chunk.tokens,
                                    columns, columns, /*add_C=*/true, chunk.transposed.data() + i * chunk.tokens,
                                    chunk.pairs.data() + 2 * j, sums + i * columns + j, /*is_vnni=*/true);
      }
      at::native::cpublas::brgemm_release();
    });
  }
}

void AddFloat(const at::Tensor& inputs, at::Tensor& upper) {
  const int64_t columns = upper.size(0);
  for (int64_t first = 0; first < inputs.size(0); first += kFloatChunkTokens) {
    const at::Tensor x = inputs.slice(0, first, std::min(first + kFloatChunkTokens, inputs.size(0))).to(at::kFloat);
    for (int64_t c = 0; c < columns; c += kBlock) {
      at::Tensor rows = upper.slice(0, c, std::min(c + kBlock, columns)).slice(1, c);
      rows.addmm_(x.slice(1, c, std::min(c + kBlock, columns)).t(), x.slice(1, c));
    }
  }
}

}  // namespace

Hessian::Hessian(int64_t columns, at::Device device)
    : upper_(at::zeros({columns, columns}, at::TensorOptions().dtype(at::kFloat).device(device))) {}

void Hessian::Add(const at::Tensor& inputs) {
  const int64_t columns = upper_.size(0);
  TORCH_CHECK(inputs.dim() == 2 && inputs.size(1) == columns, "Hessian of ", columns, " columns got ", inputs.sizes());
  const at::NoGradGuard no_grad;
  if (inputs.scalar_type() == at::kBFloat16 && inputs.is_cpu() && HasBFloat16Products()) {
    AddBFloat16(inputs, upper_);
  } else {
    AddFloat(inputs, upper_);
  }
  tokens_ += inputs.size(0);
}

at::Tensor Hessian::Matrix() const { return upper_.triu() + upper_.triu(1).t(); }

}  // namespace refinery::quantize
