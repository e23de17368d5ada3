#include "worker/task/runtime/torch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <vector>

#include "worker/task/quantize/gptq.h"
#include "worker/task/quantize/grid.h"
#include "worker/task/quantize/hessian.h"
#include "worker/task/quantize/prepared_hessian.h"
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
// recomputed by Gaussian elimination of the finished column (equation 3) instead of by any Cholesky factor. The grid (a scale
// and a zero point for each row and group) and the column order are those of `ours`.
at::Tensor PaperGptq(const at::Tensor& weight, const at::Tensor& hessian, const std::vector<int64_t>& order,
                     const QuantizedLinear& ours, double damp_fraction) {
  at::Tensor w = weight.to(at::kDouble).clone();
  at::Tensor h = hessian.to(at::kDouble).clone();
  h.diagonal().add_(damp_fraction * h.diagonal().mean().item<double>());
  at::Tensor inverse = at::linalg_inv(h);
  at::Tensor quantized = at::zeros_like(w);
  const double levels = std::pow(2.0, static_cast<double>(ours.bits));
  for (const int64_t c : order) {
    const int64_t group = ours.group_index.defined() ? ours.group_index[c].item<int64_t>() : c / ours.group_size;
    const at::Tensor scale = ours.scales.select(1, group).to(at::kDouble);
    const at::Tensor zero = ours.zeros.defined() ? ours.zeros.select(1, group).to(at::kDouble) : at::full_like(scale, levels / 2);
    const at::Tensor column = w.select(1, c).clone();
    const at::Tensor rounded = scale * (at::clamp(at::round(column / scale) + zero, 0, levels - 1) - zero);
    quantized.select(1, c).copy_(rounded);
    const at::Tensor row = inverse.select(0, c).clone();
    const double pivot = inverse[c][c].item<double>();
    w.sub_(at::outer((column - rounded) / pivot, row));
    inverse.sub_(at::outer(row, row) / pivot);
  }
  return quantized;
}

// From the description, with argsort: groups by their loudest column, columns inside by loudness; or all by loudness.
std::vector<int64_t> PaperOrder(const at::Tensor& hessian, int64_t group_size, ColumnOrderKind kind) {
  const at::Tensor diagonal = hessian.diagonal();
  const int64_t columns = diagonal.size(0);
  std::vector<int64_t> order;
  if (kind != ColumnOrderKind::kGroups) {
    const at::Tensor all = kind == ColumnOrderKind::kClassic ? diagonal.argsort(0, true) : at::arange(columns);
    return {all.const_data_ptr<int64_t>(), all.const_data_ptr<int64_t>() + columns};
  }
  std::vector<at::Tensor> loudest;
  for (int64_t c = 0; c < columns; c += group_size) loudest.push_back(diagonal.slice(0, c, c + group_size).max());
  const at::Tensor group_order = at::stack(loudest).argsort(0, true);
  for (int64_t i = 0; i < group_order.size(0); ++i) {
    const int64_t first = group_order[i].item<int64_t>() * group_size;
    const at::Tensor inside = diagonal.slice(0, first, first + group_size).argsort(0, true);
    for (int64_t k = 0; k < inside.size(0); ++k) order.push_back(first + inside[k].item<int64_t>());
  }
  return order;
}

// Goal: blocks, lazy updates, reversed factorisation and row tiles give what the paper's recursion gives, on every grid and in
// every order.  Method: PaperGptq with the grid that we chose; sizes on both sides of block, tile and group borders.
TEST(GptqTest, ObjectiveAndCodesAreThoseOfThePaper) {
  struct Case {
    int64_t out, in, group_size, bits;
    ColumnOrderKind order = ColumnOrderKind::kGroups;
    Grid grid = Grid::kFullRange;
  };
  for (const Case& c : {Case{48, 192, 32, 4}, Case{33, 320, 64, 3}, Case{64, 320, -1, 4}, Case{40, 256, 64, 2, ColumnOrderKind::kNatural},
                        Case{40, 384, 192, 8}, Case{130, 576, 128, 4}, Case{32, 96, 64, 3, ColumnOrderKind::kNatural},
                        Case{40, 192, 16, 2, ColumnOrderKind::kClassic}, Case{40, 352, 128, 4, ColumnOrderKind::kClassic, Grid::kSymmetric},
                        Case{40, 256, 32, 2, ColumnOrderKind::kGroups, Grid::kAsymmetric},
                        Case{40, 224, 64, 4, ColumnOrderKind::kClassic, Grid::kAsymmetric},
                        Case{40, 192, 64, 3, ColumnOrderKind::kGroups, Grid::kSymmetric},
                        Case{40, 192, 64, 8, ColumnOrderKind::kNatural, Grid::kAsymmetric}}) {
    SCOPED_TRACE(::testing::Message() << c.out << "x" << c.in << " g" << c.group_size << " b" << c.bits << " order "
                                      << static_cast<int>(c.order) << " grid " << static_cast<int>(c.grid));
    const Layer layer = SeededLayer(c.out, c.in, 1024, 7);
    GptqReport report;
    const QuantizedLinear ours =
        Gptq("layer", layer.weight, layer.hessian,
             {.bits = c.bits, .group_size = c.group_size, .grid = c.grid, .order = c.order, .refine_sweeps = 0}, &report);
    EXPECT_EQ(ours.group_index.defined(), c.order == ColumnOrderKind::kClassic);
    EXPECT_EQ(ours.zeros.defined(), c.grid == Grid::kAsymmetric);
    const std::vector<int64_t> order = PaperOrder(layer.hessian, ours.group_size, c.order);
    const at::Tensor paper = PaperGptq(layer.weight, layer.hessian, order, ours, 0.01);
    const double wanted = Objective(layer.weight, paper, layer.hessian);
    EXPECT_NEAR(Objective(layer.weight, ours.Dequantize(), layer.hessian), wanted, 1e-5 * wanted);
    const at::Tensor differs = (ours.Dequantize().to(at::kDouble) - paper).abs().gt(1e-4 * paper.abs().max());
    EXPECT_LE(differs.sum().item<int64_t>(), paper.numel() / 2000) << "more than ties";
    EXPECT_TRUE(report.notes.empty()) << report.notes[0];
    EXPECT_EQ(report.damp_fraction, 0.01);
    if (!ours.group_index.defined()) continue;
    for (int64_t i = 0; i < c.in; ++i) EXPECT_EQ(ours.group_index[order[i]].item<int64_t>(), i / ours.group_size);
  }
}

// Goal: GPTAQ's target.  Method: min over Q of |W Xn - Q Xq|^2 + damping |target - Q|^2 by a float64 solve: target = W + alpha W D
// H^-1, D = (Xn - Xq) Xq^T; the codes must be the paper's recursion on it, and with alpha 1 the outputs nearer than without.
TEST(GptqTest, CrossMatrixMovesTheTargetToTheNativeOutputs) {
  const Layer layer = SeededLayer(48, 160, 2048, 21);
  const at::Tensor native = layer.inputs + 0.3 * at::mm(layer.inputs, at::randn({160, 160}) / std::sqrt(160.0)) + 0.1 * at::randn({2048, 160});
  const at::Tensor cross = at::mm((native - layer.inputs).t(), layer.inputs);
  at::Tensor damped = layer.hessian.to(at::kDouble).clone();
  damped.diagonal().add_(0.01 * damped.diagonal().mean().item<double>());
  const at::Tensor shift = at::linalg_solve(damped, at::mm(layer.weight.to(at::kDouble), cross.to(at::kDouble)).t()).t();
  const auto distance = [&](const QuantizedLinear& q) {
    return (at::mm(native, layer.weight.t()) - at::mm(layer.inputs, q.Dequantize().t())).square().sum().item<double>();
  };
  double plain = 0;
  for (const double alpha : {0.0, 0.25, 1.0}) {
    GptqSettings settings{.bits = 3, .group_size = 32, .alpha = alpha, .refine_sweeps = 0};
    const PreparedHessian prepared = PrepareHessian("layer", layer.hessian, settings, cross);
    const QuantizedLinear ours = GptqPrepared("layer", layer.weight, prepared, settings, nullptr);
    const at::Tensor target = layer.weight.to(at::kDouble) + alpha * shift;
    const at::Tensor paper = PaperGptq(target, layer.hessian, PaperOrder(layer.hessian, 32, ColumnOrderKind::kGroups), ours, 0.01);
    const double wanted = Objective(target, paper, layer.hessian);
    EXPECT_NEAR(Objective(target, ours.Dequantize(), layer.hessian), wanted, 1e-5 * wanted) << alpha;
    settings.refine_sweeps = 2;
    const double ours_distance = distance(GptqPrepared("layer", layer.weight, prepared, settings, nullptr));
    if (alpha == 0) plain = ours_distance;
    if (alpha == 1) {
      EXPECT_LT(ours_distance, 0.7 * plain);
    }
  }
}

// Goal: coordinate descent ends where no single code and no single scale can do better, and never raises a row's objective.
// Method: the damped objective in float64, with every code moved up and down by one.
TEST(GptqTest, RefinedCodesCannotBeImprovedOneAtATime) {
  for (const Grid grid : {Grid::kFullRange, Grid::kAsymmetric}) {
    const Layer layer = SeededLayer(40, 160, 1024, 31);
    GptqSettings settings{.bits = 2, .group_size = 32, .grid = grid, .refine_sweeps = 0};
    at::Tensor h = layer.hessian.to(at::kDouble).clone();
    h.diagonal().add_(0.01 * h.diagonal().mean().item<double>());
    const auto rows = [&](const QuantizedLinear& q) {
      const at::Tensor e = layer.weight.to(at::kDouble) - q.Dequantize().to(at::kDouble);
      return (at::mm(e, h) * e).sum(1);
    };
    const at::Tensor before = rows(Gptq("layer", layer.weight, layer.hessian, settings, nullptr));
    settings.refine_sweeps = 1;
    const at::Tensor once = rows(Gptq("layer", layer.weight, layer.hessian, settings, nullptr));
    settings.refine_sweeps = 60;
    const QuantizedLinear refined = Gptq("layer", layer.weight, layer.hessian, settings, nullptr);
    const at::Tensor after = rows(refined);
    EXPECT_TRUE(once.le(before * (1 + 1e-6)).all().item<bool>());
    EXPECT_TRUE(after.le(once * (1 + 1e-6)).all().item<bool>());
    EXPECT_LT(once.sum().item<double>(), 0.97 * before.sum().item<double>());
    const at::Tensor e = layer.weight.to(at::kDouble) - refined.Dequantize().to(at::kDouble);
    const at::Tensor gradient = at::mm(e, h);
    const at::Tensor scales = refined.scales.to(at::kDouble).repeat_interleave(32, 1);
    for (const double step : {-1.0, 1.0}) {
      const at::Tensor code = refined.codes.to(at::kDouble) + step;
      const at::Tensor gain = 2 * step * scales * gradient - (step * scales).square() * h.diagonal();
      const at::Tensor better = code.ge(0).logical_and(code.le(3)).logical_and(gain.gt(1e-6 * after.unsqueeze(1)));
      EXPECT_EQ(better.sum().item<int64_t>(), 0) << "step " << step;
    }
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

// Goal: tasks run in LibTorch's inference mode, which is a thread's own, and several threads share a matrix.
TEST(GptqTest, SeveralThreadsInInferenceMode) {
  const Layer layer = SeededLayer(400, 128, 300, 8);
  const QuantizedLinear wanted = Gptq("layer", layer.weight, layer.hessian, {}, nullptr);
  const int threads = at::get_num_threads();
  at::set_num_threads(3);
  {
    const c10::InferenceMode mode;
    const QuantizedLinear got = Gptq("layer", layer.weight.clone(), layer.hessian.clone(), {}, nullptr);
    EXPECT_TRUE(at::equal(got.codes, wanted.codes));
    EXPECT_TRUE(at::equal(got.scales, wanted.scales));
  }
  at::set_num_threads(threads);
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

// One token, constant inputs, no input at all: the Hessian has rank one or zero and damping alone carries it. A row of zeros,
// a constant row, one weight far from all others and weights of one sign, on every grid and in every order.
TEST(GptqTest, DegenerateCalibrationAndRowsStillGiveAFiniteResult) {
  Layer layer = SeededLayer(40, 96, 1, 9);
  layer.weight[0].zero_();
  layer.weight[1].fill_(0.03);
  layer.weight[2][5] = 40.0;
  layer.weight[3].abs_();
  layer.weight[4].abs_().neg_();
  layer.weight[5].slice(0, 0, 32).zero_();
  for (const Grid grid : {Grid::kFullRange, Grid::kSymmetric, Grid::kAsymmetric}) {
    for (const ColumnOrderKind order : {ColumnOrderKind::kGroups, ColumnOrderKind::kNatural, ColumnOrderKind::kClassic}) {
      for (const int64_t bits : {2, 3, 4, 8}) {
        for (const at::Tensor& inputs : {layer.inputs, at::ones({200, 96}), at::zeros({10, 96})}) {
          GptqReport report;
          const QuantizedLinear ours = Gptq("layer", layer.weight, at::mm(inputs.t(), inputs),
                                            {.bits = bits, .group_size = 32, .grid = grid, .order = order}, &report);
          SCOPED_TRACE(::testing::Message() << bits << " bits, grid " << static_cast<int>(grid) << ", order " << static_cast<int>(order));
          const at::Tensor values = ours.Dequantize();
          EXPECT_TRUE(at::isfinite(values).all().item<bool>());
          EXPECT_TRUE(ours.scales.ne(0).all().item<bool>());
          EXPECT_LE(report.relative_error, report.rtn_relative_error);
          EXPECT_EQ(values[0].abs().max().item<float>(), 0.0f);
          EXPECT_LE((values - layer.weight).abs()[6].max().item<double>(), bits == 2 ? 0.2 : 0.1);
          if (!inputs.any().item<bool>()) {
            EXPECT_THAT(report.notes, ::testing::Contains(HasSubstr("all calibration inputs are zero")));
          }
          if (ours.zeros.defined()) {
            EXPECT_GE(ours.zeros.min().item<int64_t>(), 1) << "GPTQ v1 cannot store 0";
            EXPECT_LE(ours.zeros.max().item<int64_t>(), (int64_t{1} << bits) - 1);
          }
        }
      }
    }
  }
}

// Goal: each grid covers what it says.  Method: values that lie on it exactly come back exactly.
TEST(GridTest, WeightsOnEachGridComeBackExactly) {
  at::manual_seed(12);
  for (const int64_t bits : {2, 3, 4, 8}) {
    const int64_t levels = int64_t{1} << bits;
    for (const int64_t zero : {int64_t{0}, int64_t{1}, levels / 2, levels - 1}) {
      at::Tensor codes = at::randint(0, levels, {33, 64}).to(at::kFloat);
      codes.select(1, 3).fill_(0);
      codes.select(1, 9).fill_(static_cast<double>(levels - 1));
      const at::Tensor weight = (codes - static_cast<double>(zero)) * 0.125;
      const QuantizedLinear q = RoundToNearest(weight, {.bits = bits, .group_size = 64, .grid = Grid::kAsymmetric, .smallest_zero = 0});
      EXPECT_TRUE(at::equal(q.Dequantize(), weight)) << bits << " bits, zero " << zero;
      EXPECT_TRUE(q.zeros.eq(zero).all().item<bool>());
    }
    // Positive weights with a zero point of at least 1: one code is given up, and the scale covers the rest again.
    const at::Tensor positive = (at::rand({33, 64}) + 0.2) * 0.1;
    const QuantizedLinear q = RoundToNearest(positive, {.bits = bits, .group_size = 64, .grid = Grid::kAsymmetric});
    EXPECT_TRUE(q.zeros.ge(1).all().item<bool>());
    if (bits == 8) {
      EXPECT_LT((q.Dequantize() - positive).abs().max().item<double>(), 0.12 / 254);
    }
    const QuantizedLinear symmetric = RoundToNearest(positive - 0.07, {.bits = bits, .group_size = 64, .grid = Grid::kSymmetric});
    EXPECT_TRUE(symmetric.scales.gt(0).all().item<bool>());
    EXPECT_FALSE(symmetric.zeros.defined());
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
  for (const int64_t columns : {600, 128, 33}) {  // the last neither whole vectors nor a whole panel
    const at::Tensor x = at::randn({5000, columns}).to(at::kBFloat16);
    Hessian hessian(columns, at::kCPU);
    hessian.Add(x.slice(0, 0, 4957));
    hessian.Add(x.slice(0, 4957));
    const at::Tensor matrix = hessian.Matrix();
    const at::Tensor wanted = at::mm(x.to(at::kDouble).t(), x.to(at::kDouble));
    EXPECT_EQ(hessian.tokens(), 5000);
    EXPECT_TRUE(at::equal(matrix, matrix.t()));
    EXPECT_LT((matrix.to(at::kDouble) - wanted).abs().max().item<double>(), 1e-5 * wanted.abs().max().item<double>()) << columns;
    EXPECT_THROW(hessian.Add(at::zeros({3, columns - 1})), c10::Error);
  }
}

}  // namespace
}  // namespace refinery::quantize
