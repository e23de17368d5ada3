#include "worker/task/runtime/torch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "worker/task/quantize/gptq.h"
#include "worker/task/quantize/grid.h"
#include "worker/task/quantize/hessian.h"
#include "worker/task/runtime/reporter.h"

namespace refinery::quantize {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

struct Layer {
  at::Tensor weight;   // [out, in]
  at::Tensor inputs;   // [tokens, in]
  at::Tensor hessian;  // [in, in]
};

// Correlated inputs with a few loud channels, as in real models.
Layer SeededLayer(int64_t out, int64_t in, int64_t tokens, uint64_t seed) {
  at::manual_seed(seed);
  Layer layer;
  layer.weight = at::randn({out, in}) * 0.05;
  const at::Tensor mix = at::randn({in, in}) / std::sqrt(static_cast<double>(in)) + at::eye(in);
  const at::Tensor loudness = at::exp(0.7 * at::randn({in}));
  layer.inputs = at::mm(at::randn({tokens, in}) * loudness, mix);
  layer.hessian = at::mm(layer.inputs.t(), layer.inputs);
  return layer;
}

double Objective(const at::Tensor& weight, const at::Tensor& quantized, const at::Tensor& hessian) {
  const at::Tensor e = weight.to(at::kDouble) - quantized.to(at::kDouble);
  return (at::mm(e, hessian.to(at::kDouble)) * e).sum().item<double>();
}

// GPTQ as the paper writes it, in float64, one weight at a time and one column after the other: the inverse Hessian is
// recomputed by Gaussian elimination of the finished column (equation 3) instead of by any Cholesky factor. The grid (one
// scale for each row and group) and the column order are given.
at::Tensor PaperGptq(const Layer& layer, const std::vector<int64_t>& order, const at::Tensor& scales, int64_t group_size,
                     int64_t bits, double damp_fraction) {
  at::Tensor w = layer.weight.to(at::kDouble).clone();
  at::Tensor h = layer.hessian.to(at::kDouble).clone();
  h.diagonal().add_(damp_fraction * h.diagonal().mean().item<double>());
  at::Tensor inverse = at::linalg_inv(h);
  at::Tensor quantized = at::zeros_like(w);
  const double zero = std::pow(2.0, static_cast<double>(bits - 1));
  for (const int64_t c : order) {
    const at::Tensor scale = scales.select(1, c / group_size).to(at::kDouble);
    const at::Tensor column = w.select(1, c).clone();
    const at::Tensor rounded = scale * at::clamp(at::round(column / scale), -zero, zero - 1);
    quantized.select(1, c).copy_(rounded);
    const at::Tensor row = inverse.select(0, c).clone();
    const double pivot = inverse[c][c].item<double>();
    w.sub_(at::outer((column - rounded) / pivot, row));
    inverse.sub_(at::outer(row, row) / pivot);
  }
  return quantized;
}

// Groups by their loudest column, columns inside by loudness: from the description, with argsort.
std::vector<int64_t> GroupAwareOrder(const at::Tensor& hessian, int64_t group_size) {
  const at::Tensor diagonal = hessian.diagonal();
  const int64_t groups = diagonal.size(0) / group_size;
  const at::Tensor loudest = std::get<0>(diagonal.view({groups, group_size}).max(1));
  std::vector<int64_t> order;
  const at::Tensor group_order = loudest.argsort(0, true);
  for (int64_t i = 0; i < groups; ++i) {
    const int64_t g = group_order[i].item<int64_t>();
    const at::Tensor inside = diagonal.slice(0, g * group_size, (g + 1) * group_size).argsort(0, true);
    for (int64_t j = 0; j < group_size; ++j) order.push_back(g * group_size + inside[j].item<int64_t>());
  }
  return order;
}

// Goal: blocks, lazy updates, reversed factorisation and row tiles give what the paper's recursion gives.
// Method: PaperGptq with the grid that we chose; sizes on both sides of block and tile borders.
TEST(GptqTest, ObjectiveIsThatOfThePaper) {
  struct Case {
    int64_t out, in, group_size, bits;
    bool order_groups;
  };
  for (const Case& c : {Case{48, 192, 32, 4, true}, Case{33, 320, 64, 3, true}, Case{64, 320, 320, 4, true},
                        Case{40, 256, 64, 2, false}, Case{40, 384, 192, 8, true}}) {
    SCOPED_TRACE(::testing::Message() << c.out << "x" << c.in << " g" << c.group_size << " b" << c.bits);
    const Layer layer = SeededLayer(c.out, c.in, 1024, 7);
    GptqReport report;
    const QuantizedLinear ours = Gptq("layer", layer.weight, layer.hessian,
                                      {.bits = c.bits, .group_size = c.group_size,
                                       .order = c.order_groups ? ColumnOrderKind::kGroups : ColumnOrderKind::kNatural,
                                       .refine_sweeps = 0},
                                      &report);
    std::vector<int64_t> order(c.in);
    for (int64_t i = 0; i < c.in; ++i) order[i] = i;
    if (c.order_groups) order = GroupAwareOrder(layer.hessian, c.group_size);
    const at::Tensor paper = PaperGptq(layer, order, ours.scales, c.group_size, c.bits, 0.01);
    const double wanted = Objective(layer.weight, paper, layer.hessian);
    EXPECT_NEAR(Objective(layer.weight, ours.Dequantize(), layer.hessian), wanted, 1e-5 * wanted);
    EXPECT_TRUE(report.notes.empty()) << report.notes[0];
    EXPECT_EQ(report.damp_fraction, 0.01);
  }
}

// Goal: the report's errors are tr((W-Q) H (W-Q)^T) / tr(W H W^T), and GPTQ pays.  Method: float64, directly.
TEST(GptqTest, ReportHoldsTheObjectiveAndBeatsRounding) {
  for (const int64_t bits : {2, 3, 4}) {
    const Layer layer = SeededLayer(64, 256, 2048, 11);
    GptqReport report;
    const GptqSettings settings{.bits = bits, .group_size = 64};
    const QuantizedLinear ours = Gptq("layer", layer.weight, layer.hessian, settings, &report);
    const at::Tensor zero = at::zeros_like(layer.weight);
    const double signal = Objective(layer.weight, zero, layer.hessian);
    const double error = Objective(layer.weight, ours.Dequantize(), layer.hessian) / signal;
    const double nearest =
        Objective(layer.weight, RoundToNearest(layer.weight, settings).Dequantize(), layer.hessian) / signal;
    EXPECT_NEAR(report.relative_error, error, 1e-4 * error);
    EXPECT_NEAR(report.rtn_relative_error, nearest, 1e-4 * nearest);
    EXPECT_LT(error, 0.75 * nearest) << bits << " bits";
  }
}

// Goal: never worse than rounding, whatever the inputs.  Method: many small layers, some with very few tokens.
TEST(GptqTest, NeverAboveRounding) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    for (const int64_t tokens : {1, 3, 64, 400}) {
      const Layer layer = SeededLayer(8, 64, tokens, seed);
      GptqReport report;
      const GptqSettings settings{.bits = 3, .group_size = 32};
      const QuantizedLinear ours = Gptq("layer", layer.weight, layer.hessian, settings, &report);
      const double error = Objective(layer.weight, ours.Dequantize(), layer.hessian);
      const double nearest =
          Objective(layer.weight, RoundToNearest(layer.weight, settings).Dequantize(), layer.hessian);
      EXPECT_LE(error, nearest * (1 + 1e-5)) << "seed " << seed << " tokens " << tokens;
      EXPECT_LE(report.relative_error, report.rtn_relative_error);
    }
  }
}

// With a diagonal Hessian no column can help another: GPTQ must be rounding on its own grid, exactly.
TEST(GptqTest, DiagonalHessianIsPlainRounding) {
  at::manual_seed(3);
  const at::Tensor weight = at::randn({32, 128});
  const QuantizedLinear ours = Gptq("layer", weight, at::eye(128) * 5.0, {.bits = 4, .group_size = 32}, nullptr);
  const at::Tensor scales = ours.scales.to(at::kDouble).repeat_interleave(32, 1);
  const at::Tensor wanted = at::clamp(at::round(weight.to(at::kDouble) / scales), -8, 7) + 8;
  EXPECT_TRUE(at::equal(ours.codes, wanted.to(at::kByte)));
  const at::Tensor nearest = RoundToNearest(weight, {.bits = 4, .group_size = 32}).Dequantize();
  EXPECT_LE((ours.Dequantize() - weight).square().sum().item<double>(), (nearest - weight).square().sum().item<double>());
}

// Goal: bits reproduce.  Method: twice, and with the Hessian times a power of two, which must change nothing.
TEST(GptqTest, DeterministicAndIndependentOfTheHessiansFactor) {
  const Layer layer = SeededLayer(96, 256, 512, 5);
  const QuantizedLinear first = Gptq("layer", layer.weight, layer.hessian, {}, nullptr);
  const QuantizedLinear again = Gptq("layer", layer.weight, layer.hessian, {}, nullptr);
  const QuantizedLinear scaled = Gptq("layer", layer.weight, layer.hessian * 1024, {}, nullptr);
  EXPECT_TRUE(at::equal(first.codes, again.codes) && at::equal(first.scales, again.scales));
  EXPECT_TRUE(at::equal(first.codes, scaled.codes) && at::equal(first.scales, scaled.scales));
}

TEST(GptqTest, NumbersThatAreNotFiniteNameModuleAndColumn) {
  for (const double bad : {std::numeric_limits<double>::quiet_NaN(), std::numeric_limits<double>::infinity()}) {
    Layer layer = SeededLayer(32, 64, 128, 1);
    layer.weight[3][17] = bad;
    try {
      Gptq("model.layers.2.mlp.down_proj", layer.weight, layer.hessian, {}, nullptr);
      FAIL() << "accepted " << bad;
    } catch (const runtime::NumericException& e) {
      EXPECT_THAT(e.what(), AllOf(HasSubstr("model.layers.2.mlp.down_proj"), HasSubstr("weight"), HasSubstr("column 17")));
    }
    layer = SeededLayer(32, 64, 128, 1);
    layer.inputs[5][9] = bad;
    try {
      Gptq("model.layers.2.mlp.down_proj", layer.weight, at::mm(layer.inputs.t(), layer.inputs), {}, nullptr);
      FAIL() << "accepted " << bad;
    } catch (const runtime::NumericException& e) {
      EXPECT_THAT(e.what(), AllOf(HasSubstr("model.layers.2.mlp.down_proj"), HasSubstr("Hessian"), HasSubstr("column 9")));
    }
  }
}

TEST(GptqTest, DeadColumnsAndZeroRowsAreHarmless) {
  Layer layer = SeededLayer(32, 128, 512, 2);
  layer.inputs.slice(1, 40, 50).zero_();
  layer.weight[4].zero_();
  layer.weight[6].slice(0, 0, 64).zero_();
  layer.hessian = at::mm(layer.inputs.t(), layer.inputs);
  GptqReport report;
  const QuantizedLinear ours = Gptq("layer", layer.weight, layer.hessian, {.bits = 4, .group_size = 64}, &report);
  EXPECT_EQ(report.dead_columns, 10);
  EXPECT_LT(report.relative_error, report.rtn_relative_error);
  const at::Tensor scales = ours.scales.to(at::kFloat);
  EXPECT_TRUE(at::isfinite(scales).all().item<bool>());
  EXPECT_TRUE(scales.ne(0).all().item<bool>());
  EXPECT_EQ(ours.Dequantize()[4].abs().max().item<float>(), 0.0f);
  // Dead columns are rounded like any other weight: half a step at most, clipping aside.
  const at::Tensor step = scales.abs().repeat_interleave(64, 1);
  const at::Tensor off = ((ours.Dequantize() - layer.weight).abs() / step).slice(1, 40, 50);
  EXPECT_LE(off.median().item<float>(), 0.5f);
}

// One token, constant inputs, no input at all: the Hessian has rank one or zero and damping alone carries it.
TEST(GptqTest, DegenerateCalibrationStillGivesAFiniteResult) {
  const Layer layer = SeededLayer(32, 96, 1, 9);
  const at::Tensor constant = at::ones({200, 96});
  for (const at::Tensor& inputs : {layer.inputs, constant, at::zeros({10, 96})}) {
    GptqReport report;
    const QuantizedLinear ours = Gptq("layer", layer.weight, at::mm(inputs.t(), inputs), {.group_size = 32}, &report);
    EXPECT_TRUE(at::isfinite(ours.Dequantize()).all().item<bool>());
    EXPECT_LE(report.relative_error, report.rtn_relative_error);
    EXPECT_LE((ours.Dequantize() - layer.weight).abs().max().item<double>(), 0.1);
  }
}

// Without damping a Hessian of rank one cannot be factorised: damping is raised, and that is said.
TEST(GptqTest, DampingIsRaisedUntilTheFactorisationSucceedsAndNoted) {
  const Layer layer = SeededLayer(16, 64, 1, 4);
  GptqReport report;
  const QuantizedLinear ours =
      Gptq("layer", layer.weight, layer.hessian, {.group_size = 32, .damp_fraction = 0}, &report);
  EXPECT_GT(report.damp_fraction, 0);
  ASSERT_FALSE(report.notes.empty());
  EXPECT_THAT(report.notes[0], HasSubstr("damp_fraction raised"));
  EXPECT_TRUE(at::isfinite(ours.Dequantize()).all().item<bool>());
}

TEST(GridTest, ScalesAreExactInFloat16) {
  at::manual_seed(0);
  at::Tensor values = at::randn({4096}) * at::exp(10 * at::randn({4096}));
  for (int64_t i = 0; i < values.size(0); ++i) {
    const float value = values[i].item<float>();
    const float ours = RoundScaleToHalf(value);
    const float half = static_cast<float>(static_cast<at::Half>(value));
    if (half == 0 || std::isinf(half)) {
      EXPECT_EQ(std::fabs(ours), half == 0 ? 0x1p-24f : 65504.0f);
    } else {
      EXPECT_EQ(ours, half) << value;
    }
  }
}

// Goal: the grid search is worth it and uses the whole range.  Method: against the plain absmax scale on the same weights.
TEST(GridTest, SearchBeatsTheAbsoluteMaximum) {
  at::manual_seed(8);
  const at::Tensor weight = at::randn({64, 64});
  const at::Tensor ours = RoundToNearest(weight, {.bits = 4, .group_size = 64}).Dequantize();
  const at::Tensor step = std::get<0>(weight.abs().max(1, true)) * 2 / 15;
  const at::Tensor plain = step * at::clamp(at::round(weight / step), -8, 7);
  EXPECT_LT((ours - weight).square().sum().item<double>(), 0.95 * (plain - weight).square().sum().item<double>());
  // Weights that lie on a grid already come back exactly.
  const at::Tensor lattice = at::randint(-8, 8, {64, 64}).to(at::kFloat);
  lattice.select(1, 0).fill_(-8);
  EXPECT_TRUE(at::equal(RoundToNearest(lattice * 0.25, {.bits = 4, .group_size = 64}).Dequantize(), lattice * 0.25));
}

// Goal: chunks, blocks and bf16 inputs give X^T X.  Method: float64 product; products of bf16 values are exact in float32.
TEST(HessianTest, AccumulatesTheProductOfAllTokens) {
  at::manual_seed(6);
  const at::Tensor x = at::randn({5000, 600}).to(at::kBFloat16);
  Hessian hessian(600, at::kCPU);
  hessian.Add(x.slice(0, 0, 4999));
  hessian.Add(x.slice(0, 4999));
  const at::Tensor matrix = hessian.Matrix();
  const at::Tensor wanted = at::mm(x.to(at::kDouble).t(), x.to(at::kDouble));
  EXPECT_EQ(hessian.tokens(), 5000);
  EXPECT_TRUE(at::equal(matrix, matrix.t()));
  EXPECT_LT((matrix.to(at::kDouble) - wanted).abs().max().item<double>(), 1e-5 * wanted.abs().max().item<double>());
  EXPECT_THROW(hessian.Add(at::zeros({3, 599})), c10::Error);
}

}  // namespace
}  // namespace refinery::quantize
