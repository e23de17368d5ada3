#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <gtest/gtest.h>

#include "worker/task/model/ops.h"

namespace refinery::model {
namespace {

// Largest difference from the float64 oracle, in units of the result's own rounding step.
double RoundingSteps(const at::Tensor& got, const at::Tensor& want) {
  const double epsilon = got.scalar_type() == at::kBFloat16 ? 0x1p-8 : 0x1p-20;
  return ((got.to(at::kDouble) - want).abs() / (want.abs() + 1e-3)).max().item<double>() / epsilon;
}

struct Case {
  at::ScalarType dtype;
  int64_t rows, columns;
};
class OpsTest : public ::testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(Shapes, OpsTest,
                         ::testing::Values(Case{at::kFloat, 3, 5}, Case{at::kFloat, 130, 576}, Case{at::kFloat, 2, 33},
                                           Case{at::kBFloat16, 3, 5}, Case{at::kBFloat16, 130, 576}, Case{at::kBFloat16, 2, 33}));

// Goal: the CPU kernels round the exact result once, forward and backward, also where rows are no multiple of 16.
// Oracle: the formula in float64 under autograd.
TEST_P(OpsTest, RmsNormIsExact) {
  at::manual_seed(1);
  const auto [dtype, rows, columns] = GetParam();
  const at::Tensor x = at::randn({rows, columns}).to(dtype).requires_grad_(), weight = at::randn({columns}).to(dtype);
  const at::Tensor dy = at::randn({rows, columns}).to(dtype);
  const at::Tensor wide = x.detach().to(at::kDouble).requires_grad_();
  const at::Tensor want = wide * (wide.square().mean(-1, true) + 1e-5).rsqrt() * weight.to(at::kDouble);
  const at::Tensor got = RmsNorm(x, weight, 1e-5);
  EXPECT_LE(RoundingSteps(got, want), 1);
  got.backward(dy);
  want.backward(dy.to(at::kDouble));
  EXPECT_LE(((x.grad().to(at::kDouble) - wide.grad()).norm() / wide.grad().norm()).item<double>(),
            dtype == at::kBFloat16 ? 0.004 : 1e-6);
}

TEST_P(OpsTest, SiluMulIsExact) {
  at::manual_seed(2);
  const auto [dtype, rows, columns] = GetParam();
  const at::Tensor x = (at::randn({rows, 2 * columns}) * 4).to(dtype).requires_grad_();
  const at::Tensor dy = at::randn({rows, columns}).to(dtype);
  const at::Tensor wide = x.detach().to(at::kDouble).requires_grad_();
  const at::Tensor want = at::silu(wide.narrow(1, 0, columns)) * wide.narrow(1, columns, columns);
  const at::Tensor got = SiluMul(x);
  EXPECT_LE(RoundingSteps(got, want), 1);
  got.backward(dy);
  want.backward(dy.to(at::kDouble));
  EXPECT_LE(((x.grad().to(at::kDouble) - wide.grad()).norm() / wide.grad().norm()).item<double>(),
            dtype == at::kBFloat16 ? 0.004 : 1e-6);
}

// Goal: extreme gates neither overflow nor hide a NaN.
TEST(OpsTest, SiluMulAtTheEdges) {
  const at::Tensor gates = at::tensor({-1e30, -200.0, 0.0, 200.0, 1e30, std::nan("")}, at::kFloat);
  const at::Tensor x = at::cat({gates.repeat({6}), at::ones({36})}).unsqueeze(0);  // 36 columns: two whole vectors and a tail
  const at::Tensor y = SiluMul(x).view({6, 6});
  for (int64_t i = 0; i < 6; ++i) {
    EXPECT_NEAR(y[i][1].item<float>(), 0, 1e-30);
    EXPECT_EQ(y[i][3].item<float>(), 200);
    EXPECT_EQ(y[i][4].item<float>(), 1e30f);
    EXPECT_TRUE(std::isnan(y[i][5].item<float>()));
  }
  EXPECT_TRUE(std::isnan(RmsNorm(at::full({1, 32}, std::nan("")).to(at::kBFloat16), at::ones({32}, at::kBFloat16), 1e-5)
                             .sum().item<float>()));
}

// Softmax attention spelled out in float64 with an explicit mask.
at::Tensor AttentionSpelledOut(const at::Tensor& qkv, const std::vector<int64_t>& lengths, const AttentionShape& shape) {
  const int64_t n = shape.heads, m = shape.kv_heads, d = shape.head_dim;
  std::vector<at::Tensor> contexts;
  int64_t begin = 0;
  for (int64_t length : lengths) {
    const at::Tensor rows = qkv.to(at::kDouble).narrow(0, begin, length).view({length, n + 2 * m, d}).transpose(0, 1);
    const at::Tensor k = rows.narrow(0, n, m).repeat_interleave(n / m, 0), v = rows.narrow(0, n + m, m).repeat_interleave(n / m, 0);
    const at::Tensor age = at::arange(length).unsqueeze(1) - at::arange(length);
    const at::Tensor hidden = (age < 0).logical_or(age >= (shape.sliding_window > 0 ? shape.sliding_window : length));
    const at::Tensor scores = at::matmul(rows.narrow(0, 0, n), k.transpose(1, 2)) / std::sqrt(static_cast<double>(d));
    contexts.push_back(at::matmul(scores.masked_fill(hidden, -INFINITY).softmax(-1), v).transpose(0, 1).reshape({length, n * d}));
    begin += length;
  }
  return at::cat(contexts);
}

// Goal: the window and grouped heads.
TEST(OpsTest, AttentionEqualsSoftmaxSpelledOut) {
  at::manual_seed(3);
  const AttentionShape shape{.heads = 6, .kv_heads = 2, .head_dim = 10, .sliding_window = 4};
  const std::vector<int64_t> lengths = {1, 9, 9, 3, 0, 20};
  const int64_t tokens = 42, d = 10;
  const at::Tensor qkv = at::randn({tokens, 100}), cos = at::ones({tokens, d}), sin = at::zeros({tokens, d});
  const at::Tensor wide = qkv.to(at::kDouble), expected = AttentionSpelledOut(qkv, lengths, shape);
  EXPECT_LT((PackedAttention(qkv, cos, sin, lengths, shape).to(at::kDouble) - expected).abs().max().item<double>(), 1e-5);
  EXPECT_LT((PackedAttention(wide, cos, sin, lengths, shape) - expected).abs().max().item<double>(), 1e-10);
}

// Goal: the passes without gradient in bfloat16, odd lengths and several turns of a long sequence among them; what follows a
// sequence's last position in memory must not matter.
TEST(OpsTest, AttentionInBfloat16) {
  at::manual_seed(4);
  const std::vector<int64_t> lengths = {1, 37, 0, 150, 16, 3};
  const int64_t tokens = 207, d = 32;
  for (const AttentionShape& shape : {AttentionShape{.heads = 6, .kv_heads = 2, .head_dim = d},
                                      AttentionShape{.heads = 6, .kv_heads = 2, .head_dim = d, .sliding_window = 21},
                                      AttentionShape{.heads = 2, .kv_heads = 2, .head_dim = d}}) {
    const at::Tensor qkv = at::randn({tokens, (shape.heads + 2 * shape.kv_heads) * d}).to(at::kBFloat16);
    const at::Tensor cos = at::ones({tokens, d}), sin = at::zeros({tokens, d}), expected = AttentionSpelledOut(qkv, lengths, shape);
    const at::Tensor got = PackedAttention(qkv, cos, sin, lengths, shape);
    // Weights and results have 8 bits: a relative step of 2^-8 of values up to about 4.
    EXPECT_LT((got.to(at::kDouble) - expected).abs().max().item<double>(), 0.02) << shape.heads << " " << shape.sliding_window;
    at::Tensor leaf = qkv.clone().requires_grad_();  // the differentiable path
    EXPECT_LT((PackedAttention(leaf, cos, sin, lengths, shape).to(at::kDouble) - expected).abs().max().item<double>(), 0.02);
    const at::Tensor alone = PackedAttention(qkv.narrow(0, 38, 150), cos.narrow(0, 0, 150), sin.narrow(0, 0, 150), {150}, shape);
    EXPECT_TRUE(at::equal(alone, got.narrow(0, 38, 150)));
  }
}

// Goal: the gradient in bfloat16, of grouped heads, windows, odd lengths, turned queries and keys.  Method: LibTorch's autograd of the
// spelled-out attention in double. Three roundings to 8 bits lie between (weights, their changes, results), each 2^-9 at most.
TEST(OpsTest, AttentionGradientInBfloat16) {
  at::manual_seed(5);
  const std::vector<int64_t> lengths = {1, 37, 0, 150, 16, 3, 64};
  const int64_t tokens = 271;
  for (const AttentionShape& shape : {AttentionShape{.heads = 6, .kv_heads = 2, .head_dim = 64},
                                      AttentionShape{.heads = 6, .kv_heads = 2, .head_dim = 32, .sliding_window = 21},
                                      AttentionShape{.heads = 2, .kv_heads = 2, .head_dim = 80},
                                      AttentionShape{.heads = 4, .kv_heads = 1, .head_dim = 128, .sliding_window = 5}}) {
    const int64_t d = shape.head_dim;
    const at::Tensor half = at::rand({tokens, d / 2}) * 6, angles = at::cat({half, half}, 1), cos = angles.cos(), sin = angles.sin();
    const at::Tensor qkv = at::randn({tokens, (shape.heads + 2 * shape.kv_heads) * d}).to(at::kBFloat16);
    const at::Tensor dout = at::randn({tokens, shape.heads * d}).to(at::kBFloat16);
    const at::Tensor leaf = qkv.clone().requires_grad_(), wide = qkv.to(at::kDouble).requires_grad_();
    PackedAttention(leaf, cos, sin, lengths, shape).backward(dout);
    PackedAttention(wide, cos, sin, lengths, shape).backward(dout.to(at::kDouble));
    const int64_t n = shape.heads, m = shape.kv_heads;
    for (const auto& [begin, heads] : {std::pair<int64_t, int64_t>{0, n}, {n, m}, {n + m, m}}) {
      const at::Tensor expected = wide.grad().narrow(1, begin * d, heads * d);
      const at::Tensor error = leaf.grad().narrow(1, begin * d, heads * d).to(at::kDouble) - expected;
      const double size = expected.square().mean().sqrt().item<double>(), most = expected.abs().max().item<double>();
      EXPECT_LE(error.square().mean().sqrt().item<double>(), size * 3 / 512) << shape.head_dim << ", head " << begin;
      EXPECT_LE(error.abs().max().item<double>(), most * 3 / 256) << shape.head_dim << ", head " << begin;
    }
    // A sequence's gradient does not depend on what shares the call.
    const at::Tensor alone = qkv.narrow(0, 38, 150).clone().requires_grad_();
    PackedAttention(alone, cos.narrow(0, 38, 150), sin.narrow(0, 38, 150), {150}, shape).backward(dout.narrow(0, 38, 150));
    EXPECT_TRUE(at::equal(alone.grad(), leaf.grad().narrow(0, 38, 150)));
  }
}

}  // namespace
}  // namespace refinery::model
