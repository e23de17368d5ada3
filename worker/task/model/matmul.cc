#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <algorithm>
#include <atomic>

#include "worker/task/model/matmul.h"
#include "worker/task/model/pair_matmul.h"
#include "worker/task/model/pair_simd.h"

namespace refinery::model {
namespace {

using simd::Bf16;

constexpr int64_t kManyRows = 32;
// A panel holds 64 columns of so many inputs: it must stay in the second-level cache.
constexpr int64_t kMostInputs = 4096;

Bf16* Data(const at::Tensor& tensor) { return tensor.defined() ? static_cast<Bf16*>(tensor.data_ptr()) : nullptr; }

bool IsRows(const at::Tensor& t) {
  return t.dim() == 2 && t.is_cpu() && t.scalar_type() == at::kBFloat16 && (t.stride(1) == 1 || t.size(1) == 1);
}

// All units, by ATen's threads: each takes those of its own share first, neighbours of which share a panel, then others'.
void RunUnits(const kernels::PairMatmul& matmul) {
  const int64_t units = kernels::PairMatmulUnits(matmul), members = std::min<int64_t>(at::get_num_threads(), units);
  if (units == 0) return;
  std::vector<std::atomic<int64_t>> next(static_cast<size_t>(members));
  for (int64_t m = 0; m < members; ++m) next[static_cast<size_t>(m)].store(units * m / members);
  at::parallel_for(0, members, 1, [&](int64_t begin, int64_t end) {
    const at::Tensor numbers = at::empty({kernels::PairPanelNumbers(matmul.inputs)}, at::kInt);  // ATen aligns to 64 bytes
    kernels::PairPanel panel{.numbers = static_cast<uint32_t*>(numbers.data_ptr())};
    for (int64_t member = begin; member < end; ++member) {
      for (int64_t i = 0; i < members; ++i) {
        const int64_t whose = (member + i) % members, last = units * (whose + 1) / members;
        std::atomic<int64_t>& turn = next[static_cast<size_t>(whose)];
        for (int64_t unit = turn.fetch_add(1); unit < last; unit = turn.fetch_add(1)) kernels::PairMatmulUnit(matmul, unit, panel);
      }
    }
  });
}

}  // namespace

bool TakesPairMatmul(const at::Tensor& x, const at::Tensor& weight) {
  if (!kernels::HasPairs() || !IsRows(x) || !IsRows(weight) || !weight.is_contiguous()) return false;
  if (x.size(0) < kManyRows || x.size(1) % 2 != 0) return false;
  return !at::GradMode::is_enabled() || !(x.requires_grad() || weight.requires_grad());
}

at::Tensor Matmul(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, const at::Tensor& residual) {
  TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(1), "Matmul: x ", x.sizes(), ", weight ", weight.sizes());
  const bool fits = (!bias.defined() || (bias.is_contiguous() && bias.scalar_type() == at::kBFloat16)) &&
                    (!residual.defined() || (residual.is_contiguous() && residual.scalar_type() == at::kBFloat16));
  if (!fits || !TakesPairMatmul(x, weight)) {
    const at::Tensor y = at::linear(x, weight, bias);
    return residual.defined() ? residual + y : y;
  }
  const int64_t rows = x.size(0), outputs = weight.size(0);
  TORCH_CHECK(!bias.defined() || bias.numel() == outputs, "Matmul: bias ", bias.sizes(), " for ", outputs, " outputs");
  TORCH_CHECK(!residual.defined() || (residual.size(0) == rows && residual.size(1) == outputs), "Matmul: residual ", residual.sizes());
  const at::Tensor y = at::empty({rows, outputs}, x.options());
  RunUnits({.x = Data(x), .rows = rows, .inputs = x.size(1), .x_stride = x.stride(0), .weight = Data(weight), .outputs = outputs,
            .bias = Data(bias), .residual = Data(residual), .y = Data(y), .y_stride = outputs});
  return y;
}

at::Tensor MatmulByInputs(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& residual) {
  TORCH_CHECK(x.dim() == 2 && weight.dim() == 2 && x.size(1) == weight.size(0), "MatmulByInputs: x ", x.sizes(), ", weight ", weight.sizes());
  TORCH_CHECK(!residual.defined() || (residual.size(0) == x.size(0) && residual.size(1) == weight.size(1)), "MatmulByInputs: residual ",
              residual.sizes());
  const bool fits = !residual.defined() || (residual.is_contiguous() && residual.scalar_type() == at::kBFloat16);
  if (!fits || !TakesPairMatmul(x, weight)) return residual.defined() ? at::addmm(residual, x, weight) : at::mm(x, weight);
  const int64_t rows = x.size(0), inputs = x.size(1), outputs = weight.size(1);
  const at::Tensor y = at::empty({rows, outputs}, x.options());
  const at::Tensor partial = inputs > kMostInputs ? at::zeros({rows, outputs}, at::kFloat) : at::Tensor();
  for (int64_t begin = 0; begin == 0 || begin < inputs; begin += kMostInputs) {
    const int64_t count = std::min(kMostInputs, inputs - begin);
    const bool last = begin + count == inputs;
    RunUnits({.x = Data(x) + begin, .rows = rows, .inputs = count, .x_stride = x.stride(0), .weight = Data(weight) + begin * outputs,
              .outputs = outputs, .by_inputs = true, .residual = last ? Data(residual) : nullptr,
              .partial = partial.defined() ? partial.data_ptr<float>() : nullptr, .y = last ? Data(y) : nullptr, .y_stride = outputs});
  }
  return y;
}

at::Tensor GatedMatmul(const at::Tensor& x, const at::Tensor& gate, const at::Tensor& up) {
  TORCH_CHECK(x.dim() == 2 && gate.dim() == 2 && x.size(1) == gate.size(1) && gate.sizes() == up.sizes(), "GatedMatmul: x ", x.sizes(),
              ", gate ", gate.sizes(), ", up ", up.sizes());
  TORCH_CHECK(TakesPairMatmul(x, gate) && TakesPairMatmul(x, up), "GatedMatmul: ask TakesPairMatmul first");
  const at::Tensor y = at::empty({x.size(0), gate.size(0)}, x.options());
  RunUnits({.x = Data(x), .rows = x.size(0), .inputs = x.size(1), .x_stride = x.stride(0), .weight = Data(gate),
            .outputs = gate.size(0), .up = Data(up), .y = Data(y), .y_stride = gate.size(0)});
  return y;
}

}  // namespace refinery::model
