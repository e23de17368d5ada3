#include "worker/task/runtime/torch.h"

#include "worker/task/quantize/hessian.h"

#include <algorithm>

namespace refinery::quantize {
namespace {
constexpr int64_t kBlock = 256;         // columns of one product
constexpr int64_t kChunkTokens = 4096;  // rows turned to float32 at a time
}  // namespace

Hessian::Hessian(int64_t columns, at::Device device)
    : upper_(at::zeros({columns, columns}, at::TensorOptions().dtype(at::kFloat).device(device))) {}

void Hessian::Add(const at::Tensor& inputs) {
  const int64_t columns = upper_.size(0);
  TORCH_CHECK(inputs.dim() == 2 && inputs.size(1) == columns, "Hessian of ", columns, " columns got ", inputs.sizes());
  const at::NoGradGuard no_grad;
  for (int64_t first = 0; first < inputs.size(0); first += kChunkTokens) {
    const at::Tensor x = inputs.slice(0, first, std::min(first + kChunkTokens, inputs.size(0))).to(at::kFloat);
    for (int64_t c = 0; c < columns; c += kBlock) {
      at::Tensor rows = upper_.slice(0, c, std::min(c + kBlock, columns)).slice(1, c);
      rows.addmm_(x.slice(1, c, std::min(c + kBlock, columns)).t(), x.slice(1, c));
    }
  }
  tokens_ += inputs.size(0);
}

at::Tensor Hessian::Matrix() const { return upper_.triu() + upper_.triu(1).t(); }

}  // namespace refinery::quantize
