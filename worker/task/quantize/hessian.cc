#include "worker/task/runtime/torch.h"

#include "worker/task/quantize/hessian.h"

#include <algorithm>

#include "worker/task/model/pair_gram.h"
#include "worker/task/model/pair_simd.h"

namespace refinery::quantize {
namespace {

constexpr int64_t kBlock = 192;              // rows of one float32 product
constexpr int64_t kChunkTokens = 1024;       // bfloat16: tokens packed at a time, so that a panel stays in the second-level cache
constexpr int64_t kFloatChunkTokens = 4096;  // otherwise: rows turned to float32 at a time

// upper += x^T x, on and above the diagonal.
void AddBFloat16(const at::Tensor& inputs, at::Tensor& upper) {
  const at::Tensor x = inputs.contiguous();
  const int64_t columns = x.size(1);
  const int64_t numbers = kernels::PairGramNumbers(std::min(kChunkTokens, x.size(0)), columns);
  const at::Tensor packed = at::empty({2, numbers}, at::kInt);  // ATen aligns to 64 bytes, and so many numbers are whole lines
  auto* words = static_cast<uint32_t*>(packed.data_ptr());
  for (int64_t first = 0; first < x.size(0); first += kChunkTokens) {
    const int64_t tokens = std::min(kChunkTokens, x.size(0) - first);
    const kernels::PairGram gram{.x = static_cast<const simd::Bf16*>(x.const_data_ptr()) + first * columns, .tokens = tokens,
                                 .columns = columns, .x_stride = columns, .panels = words, .rows = words + numbers,
                                 .upper = upper.data_ptr<float>()};
    at::parallel_for(0, kernels::PairGramStrips(columns), 1, [&gram](int64_t begin, int64_t end) {
      for (int64_t strip = begin; strip < end; ++strip) kernels::PackPairGram(gram, strip);
    });
    at::parallel_for(0, kernels::PairGramUnits(columns), 1, [&gram](int64_t begin, int64_t end) {
      for (int64_t unit = begin; unit < end; ++unit) kernels::PairGramUnit(gram, unit);
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
  if (inputs.scalar_type() == at::kBFloat16 && inputs.is_cpu() && kernels::HasPairs()) {
    AddBFloat16(inputs, upper_);
  } else {
    AddFloat(inputs, upper_);
  }
  tokens_ += inputs.size(0);
}

at::Tensor Hessian::Matrix() const { return upper_.triu() + upper_.triu(1).t(); }

}  // namespace refinery::quantize
