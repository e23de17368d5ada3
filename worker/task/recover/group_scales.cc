#include "worker/task/runtime/torch.h"

#include "worker/task/recover/group_scales.h"

#include "worker/task/model/ops.h"
#include "worker/task/recover/row_kernels.h"

namespace refinery::recover {
namespace {

constexpr double kSmallestHalf = 5.9604644775390625e-8;  // 2^-24
constexpr double kLargestHalf = 65504;
constexpr int64_t kRowsPerThread = 8;

RowLayout LayoutOf(const at::Tensor& codes, const at::Tensor& scales, int64_t group_size, const at::Tensor& group_of) {
  return {.columns = codes.size(1), .groups = scales.size(1), .group_size = group_size,
          .group_of = group_of.defined() ? group_of.const_data_ptr<int32_t>() : nullptr};
}

// Calls body(T*) with the storage type of `tensor`.
template <typename Body>
void WithData(const at::Tensor& tensor, const Body& body) {
  if (tensor.scalar_type() == at::kBFloat16) {
    body(static_cast<simd::Bf16*>(tensor.data_ptr()));
  } else {
    body(static_cast<float*>(tensor.data_ptr()));
  }
}

// The group of every column, [in] int64.
at::Tensor GroupIndex(const at::Tensor& group_of, int64_t columns, int64_t group_size, at::Device device) {
  if (group_of.defined()) return group_of.to(at::kLong);
  return at::arange(columns, at::TensorOptions().dtype(at::kLong).device(device)).div(group_size, "floor");
}

}  // namespace

GroupScales::GroupScales(const quantize::QuantizedLinear& linear, at::Device device)
    : codes_(linear.codes.to(device).contiguous()),
      initial_(linear.scales.to(device, at::kFloat).contiguous()),
      group_size_(linear.group_size) {
  TORCH_CHECK(codes_.dim() == 2 && codes_.scalar_type() == at::kByte && initial_.dim() == 2 &&
                  initial_.size(0) == codes_.size(0) && group_size_ > 0,
              "GroupScales: codes ", codes_.sizes(), ", scales ", initial_.sizes(), ", group size ", group_size_);
  zeros_ = linear.zeros.defined() ? linear.zeros.to(device, at::kFloat).contiguous()
                                  : at::full_like(initial_, static_cast<double>(int64_t{1} << (linear.bits - 1)));
  TORCH_CHECK(zeros_.sizes() == initial_.sizes(), "GroupScales: zeros ", zeros_.sizes(), ", scales ", initial_.sizes());
  if (linear.group_index.defined()) group_of_ = linear.group_index.to(device, at::kInt).contiguous();
  TORCH_CHECK(group_of_.defined() || initial_.size(1) == (codes_.size(1) + group_size_ - 1) / group_size_,
              "GroupScales: ", initial_.size(1), " groups of ", group_size_, " for ", codes_.size(1), " columns");
}

at::Tensor GroupScales::Stored(const at::Tensor& scales) const {
  const at::NoGradGuard no_grad;
  // A scale that changed its sign would turn its whole group round; it stays at the smallest of its own sign instead.
  const at::Tensor sign = at::where(initial_ < 0, -1.0f, 1.0f);
  return (scales * sign).clamp_(kSmallestHalf, kLargestHalf).mul_(sign).to(at::kHalf);
}

void GroupScales::Expand(const at::Tensor& scales, const at::Tensor& weight) const {
  TORCH_CHECK(weight.sizes() == codes_.sizes() && scales.sizes() == initial_.sizes(), "GroupScales: weight ", weight.sizes());
  const at::NoGradGuard no_grad;
  const at::Tensor wide = scales.to(at::kFloat).contiguous();
  if (model::TakesCpuKernels(weight) && weight.is_contiguous()) {
    const RowLayout layout = LayoutOf(codes_, initial_, group_size_, group_of_);
    const uint8_t* codes = codes_.const_data_ptr<uint8_t>();
    const float *zeros = zeros_.const_data_ptr<float>(), *values = wide.const_data_ptr<float>();
    WithData(weight, [&](auto* data) {
      at::parallel_for(0, weight.size(0), kRowsPerThread, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          ExpandRow(layout, codes + r * layout.columns, zeros + r * layout.groups, values + r * layout.groups,
                    data + r * layout.columns);
        }
      });
    });
    return;
  }
  const at::Tensor index = GroupIndex(group_of_, codes_.size(1), group_size_, codes_.device());
  weight.copy_(codes_.to(at::kFloat).sub_(zeros_.index_select(1, index)).mul_(wide.index_select(1, index)));
}

at::Tensor GroupScales::Gradient(const at::Tensor& weight_gradient) const {
  TORCH_CHECK(weight_gradient.sizes() == codes_.sizes(), "GroupScales: gradient ", weight_gradient.sizes());
  const at::NoGradGuard no_grad;
  const at::Tensor sums = at::empty_like(initial_);
  if (model::TakesCpuKernels(weight_gradient)) {
    const at::Tensor gradient = weight_gradient.contiguous();
    const RowLayout layout = LayoutOf(codes_, initial_, group_size_, group_of_);
    const uint8_t* codes = codes_.const_data_ptr<uint8_t>();
    const float* zeros = zeros_.const_data_ptr<float>();
    float* out = sums.mutable_data_ptr<float>();
    WithData(gradient, [&](auto* data) {
      using T = std::remove_pointer_t<decltype(data)>;
      at::parallel_for(0, gradient.size(0), kRowsPerThread, [&](int64_t begin, int64_t end) {
        for (int64_t r = begin; r < end; ++r) {
          ScaleGradientRow<T>(layout, codes + r * layout.columns, zeros + r * layout.groups, data + r * layout.columns,
                              out + r * layout.groups);
        }
      });
    });
    return sums;
  }
  const at::Tensor index = GroupIndex(group_of_, codes_.size(1), group_size_, codes_.device());
  const at::Tensor products = codes_.to(at::kFloat).sub_(zeros_.index_select(1, index)).mul_(weight_gradient);
  return sums.zero_().index_add_(1, index, products);
}

}  // namespace refinery::recover
