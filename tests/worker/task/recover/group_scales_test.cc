#include "worker/task/runtime/torch.h"

#include "worker/task/recover/group_scales.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace refinery::recover {
namespace {

struct Case {
  std::string name;
  quantize::QuantizedLinear linear;
};

// Ragged last groups, sizes that are no multiple of a vector, zero points, permuted columns.
std::vector<Case> Cases() {
  at::manual_seed(3);
  std::vector<Case> cases;
  const auto add = [&](const std::string& name, int64_t out, int64_t in, int64_t group, int64_t bits) {
    const int64_t groups = (in + group - 1) / group;
    const at::Tensor sign = at::where(at::rand({out, groups}) < 0.3, -1.0f, 1.0f);
    cases.push_back({name,
                     {.codes = at::randint(0, int64_t{1} << bits, {out, in}, at::kByte),
                      .scales = (sign * (0.01 + 0.1 * at::rand({out, groups}))).to(at::kHalf),
                      .bits = bits,
                      .group_size = group}});
  };
  add("even", 6, 128, 64, 4);
  add("ragged", 5, 100, 32, 3);
  add("one group", 3, 37, 37, 8);
  add("small groups", 4, 48, 8, 2);
  add("zero points", 5, 96, 32, 8);
  cases.back().linear.zeros = at::randint(0, 256, cases.back().linear.scales.sizes(), at::kByte);
  add("permuted columns", 5, 96, 32, 4);
  cases.back().linear.group_index = (at::randperm(96) / 32).to(at::kInt);
  return cases;
}

// Goal: weights are those that everybody else makes of codes and scales.  Method: QuantizedLinear::Dequantize, exact.
TEST(GroupScalesTest, ExpandsToTheDequantizedWeights) {
  for (const Case& c : Cases()) {
    const GroupScales scales(c.linear, at::kCPU);
    for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kDouble}) {
      const at::Tensor weight = at::empty(c.linear.codes.sizes(), type);
      scales.Expand(c.linear.scales, weight);
      EXPECT_TRUE(at::equal(weight, c.linear.Dequantize().to(type))) << c.name << ", " << c10::toString(type);
    }
  }
}

// Goal: the gradient of a scale is the sum over its group of d L / d w (code - zero).  Method: w = sum of scale times mask
// differentiated by autograd in double.
TEST(GroupScalesTest, GradientIsThatOfTheClosedForm) {
  for (const Case& c : Cases()) {
    const GroupScales scales(c.linear, at::kCPU);
    const int64_t in = c.linear.codes.size(1);
    const at::Tensor index = c.linear.group_index.defined() ? c.linear.group_index.to(at::kLong)
                                                            : at::arange(in) / c.linear.group_size;
    const at::Tensor group = c.linear.group_index.defined() ? index : index.floor().to(at::kLong);
    const at::Tensor s = c.linear.scales.to(at::kDouble).requires_grad_(true);
    const at::Tensor zero = c.linear.zeros.defined() ? c.linear.zeros.to(at::kDouble).index_select(1, group)
                                                     : at::full({}, static_cast<double>(1 << (c.linear.bits - 1)), at::kDouble);
    const at::Tensor dw = at::randn(c.linear.codes.sizes(), at::kDouble);
    ((c.linear.codes.to(at::kDouble) - zero) * s.index_select(1, group) * dw).sum().backward();
    for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
      const at::Tensor got = scales.Gradient(dw.to(type)).to(at::kDouble);
      EXPECT_LT((got - s.grad()).abs().max().item<double>(), 1e-6 * s.grad().abs().max().item<double>()) << c.name;
    }
    const at::Tensor rounded = dw.to(at::kBFloat16);
    EXPECT_TRUE(at::allclose(scales.Gradient(rounded), scales.Gradient(rounded.to(at::kFloat)), 1e-5, 1e-4)) << c.name;
  }
}

// Goal: what is stored keeps the format: float16, of its own sign, finite, never 0.
TEST(GroupScalesTest, StoredScalesKeepSignAndRange) {
  const quantize::QuantizedLinear linear{.codes = at::zeros({1, 8}, at::kByte),
                                         .scales = at::tensor({0.5, -0.5, 0.25, -0.25}, at::kFloat).to(at::kHalf).view({1, 4}),
                                         .bits = 4,
                                         .group_size = 2};
  const GroupScales scales(linear, at::kCPU);
  EXPECT_TRUE(at::equal(scales.Stored(scales.initial()), linear.scales));
  const at::Tensor stored = scales.Stored(at::tensor({-1.0f, 1.0f, 1e6f, -1e6f}).view({1, 4}));
  EXPECT_EQ(stored.scalar_type(), at::kHalf);
  EXPECT_TRUE(at::equal(stored.to(at::kDouble), at::tensor({0x1p-24, -0x1p-24, 65504.0, -65504.0}, at::kDouble).view({1, 4})));
}

TEST(GroupScalesTest, RefusesWhatDoesNotFit) {
  quantize::QuantizedLinear linear = Cases()[0].linear;
  linear.scales = linear.scales.narrow(1, 0, 1);
  EXPECT_THROW(GroupScales(linear, at::kCPU), c10::Error);
  const GroupScales good(Cases()[0].linear, at::kCPU);
  EXPECT_THROW(good.Gradient(at::zeros({2, 2})), c10::Error);
}

}  // namespace
}  // namespace refinery::recover
