#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <gtest/gtest.h>

#include "worker/task/model/matmul.h"
#include "worker/task/model/pair_attention.h"
#include "worker/task/model/pair_matmul.h"
#include "worker/task/model/pair_simd.h"

namespace refinery::kernels {
namespace {

template <typename T = Bf16>
T* Data(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}

double MaxDifference(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

at::Tensor RandomHalves(at::IntArrayRef shape) { return at::randn(shape).to(at::kBFloat16); }

// A panel's numbers, aligned.
struct Scratch {
  explicit Scratch(int64_t inputs) : numbers(at::empty({PairPanelNumbers(inputs)}, at::kInt)) {
    panel.numbers = Data<uint32_t>(numbers);
  }
  at::Tensor numbers;  // ATen aligns to 64 bytes
  PairPanel panel;
};

void RunAll(const PairMatmul& matmul) {
  Scratch scratch(matmul.inputs);
  for (int64_t unit = 0; unit < PairMatmulUnits(matmul); ++unit) PairMatmulUnit(matmul, unit, scratch.panel);
}

class PairMatmulTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!HasPairs()) GTEST_SKIP() << "this CPU has no AVX512_BF16";
  }
};

// Goal: y = x W^T + b + residual for any numbers of rows, inputs and outputs, rounded once, W in either layout; a row's bits do not
// depend on others.
// Oracle: the product in float64.
TEST_F(PairMatmulTest, ProductBiasAndResidual) {
  for (const int64_t inputs : {2, 30, 66, 576}) {
    for (const int64_t outputs : {1, 16, 63, 64, 100, 192}) {
      at::manual_seed(static_cast<uint64_t>(inputs + outputs));
      const at::Tensor weight = RandomHalves({outputs, inputs}), turned = weight.t().contiguous(), bias = RandomHalves({outputs});
      const at::Tensor all = RandomHalves({400, inputs}), residuals = RandomHalves({400, outputs});
      at::Tensor first;
      for (const int64_t rows : {1, 5, 6, 7, 131, 400}) {
        for (const bool with_all : {false, true}) {
          const at::Tensor x = all.narrow(0, 0, rows), y = residuals.narrow(0, 0, rows).clone();
          RunAll({.x = Data(x), .rows = rows, .inputs = inputs, .x_stride = inputs, .weight = Data(weight), .outputs = outputs,
               .bias = with_all ? Data(bias) : nullptr, .residual = with_all ? Data(y) : nullptr, .y = Data(y), .y_stride = outputs});
          at::Tensor expected = at::linear(x.to(at::kDouble), weight.to(at::kDouble));
          if (with_all) expected = expected + bias.to(at::kDouble) + residuals.narrow(0, 0, rows).to(at::kDouble);
          const at::Tensor allowed = expected.abs() / 250 + 1e-5 * std::sqrt(inputs);  // half a unit of 8 bits, and sums in float32
          EXPECT_TRUE((y.to(at::kDouble) - expected).abs().le(allowed).all().item<bool>())
              << rows << " x " << inputs << " x " << outputs << (with_all ? ", all" : "");
          const at::Tensor again = residuals.narrow(0, 0, rows).clone();
          RunAll({.x = Data(x), .rows = rows, .inputs = inputs, .x_stride = inputs, .weight = Data(turned), .outputs = outputs,
                  .by_inputs = true, .bias = with_all ? Data(bias) : nullptr, .residual = with_all ? Data(again) : nullptr,
                  .y = Data(again), .y_stride = outputs});
          EXPECT_TRUE(at::equal(again, y)) << rows << " x " << inputs << " x " << outputs << " by inputs";
          if (!with_all) continue;
          if (!first.defined()) first = y[0].clone();
          EXPECT_TRUE(at::equal(y[0], first)) << rows << " x " << inputs << " x " << outputs;
        }
      }
    }
  }
}

// Goal: many inputs, taken in pieces, are rounded no more often than few.  Oracle: float64.
TEST_F(PairMatmulTest, ManyInputs) {
  at::manual_seed(7);
  for (const int64_t inputs : {4096, 4098, 13000}) {
    const at::Tensor x = RandomHalves({40, inputs + 6}).narrow(1, 4, inputs), weight = RandomHalves({inputs, 100});
    const at::Tensor residual = RandomHalves({40, 100}), product = at::mm(x.to(at::kDouble), weight.to(at::kDouble));
    for (const at::Tensor& added : {at::Tensor(), residual}) {
      const at::Tensor expected = added.defined() ? product + added.to(at::kDouble) : product;
      const at::Tensor allowed = expected.abs() / 250 + 1e-5 * std::sqrt(inputs);  // half a unit of 8 bits, and sums in float32
      const at::Tensor y = model::MatmulByInputs(x, weight, added);
      EXPECT_TRUE((y.to(at::kDouble) - expected).abs().le(allowed).all().item<bool>()) << inputs << (added.defined() ? ", residual" : "");
    }
  }
}

// Goal: the gated product, and rows and columns with strides of a wider matrix.  Oracle: float64.
TEST_F(PairMatmulTest, GateAndStrides) {
  for (const int64_t outputs : {8, 32, 33, 80}) {
    at::manual_seed(static_cast<uint64_t>(outputs));
    const int64_t rows = 29, inputs = 48, wide = 56, stride = 100;
    const at::Tensor x = RandomHalves({rows, wide}), gate = RandomHalves({outputs, inputs}), up = RandomHalves({outputs, inputs});
    const at::Tensor y = at::full({rows, stride}, 3.0, at::kBFloat16);
    RunAll({.x = Data(x), .rows = rows, .inputs = inputs, .x_stride = wide, .weight = Data(gate), .outputs = outputs, .up = Data(up),
         .y = Data(y), .y_stride = stride});
    const at::Tensor narrow = x.narrow(1, 0, inputs).to(at::kDouble);
    const at::Tensor expected = at::silu(at::linear(narrow, gate.to(at::kDouble))) * at::linear(narrow, up.to(at::kDouble));
    const at::Tensor found = y.narrow(1, 0, outputs).to(at::kDouble);
    EXPECT_TRUE((found - expected).abs().le(expected.abs() / 250 + 2e-4).all().item<bool>()) << outputs;
    EXPECT_TRUE(y.narrow(1, outputs, stride - outputs).eq(3.0).all().item<bool>()) << "written beyond the outputs";
  }
}

// Goal: log-sum-exp, first choice and wanted logits of a head, with equal logits and a last panel that is not full.
// Oracle: float64.
TEST_F(PairMatmulTest, Head) {
  for (const int64_t outputs : {40, 64, 200}) {
    at::manual_seed(static_cast<uint64_t>(outputs));
    const int64_t rows = 13, inputs = 64, panels = (outputs + kPanelOutputs - 1) / kPanelOutputs;
    const at::Tensor x = RandomHalves({rows, inputs}), weight = RandomHalves({outputs, inputs});
    weight[outputs - 1].copy_(weight[3]);  // equal logits in different panels, and in one panel of 40
    const at::Tensor logits = at::linear(x.to(at::kDouble), weight.to(at::kDouble));
    std::vector<PairHead::Wanted> wanted;
    std::vector<int64_t> starts = {0};
    for (int64_t p = 0; p < panels; ++p) {
      for (int32_t row = 0; row < rows; row += 2) {  // two of a row's outputs, the same one twice
        const auto output = static_cast<int32_t>(std::min(outputs - 1, p * kPanelOutputs + 3 + row));
        for (int i = 0; i < 2; ++i) wanted.push_back({.row = row, .output = output});
      }
      starts.push_back(static_cast<int64_t>(wanted.size()));
    }
    std::vector<PanelTop> tops(static_cast<size_t>(panels * rows));
    const PairHead head{.x = Data(x), .rows = rows, .inputs = inputs, .weight = Data(weight), .outputs = outputs,
                        .tops = tops.data(), .wanted = wanted.data(), .starts = starts.data()};
    Scratch scratch(inputs);
    for (int64_t p = 0; p < panels; ++p) PairHeadPanel(head, p, scratch.panel);
    for (const auto& w : wanted) EXPECT_NEAR(w.logit, logits[w.row][w.output].item<double>(), 1e-4);
    for (int64_t p = 0; p < panels; ++p) {
      const int64_t begin = p * kPanelOutputs, count = std::min(kPanelOutputs, outputs - begin);
      for (int64_t row = 0; row < rows; ++row) {
        const at::Tensor part = logits[row].narrow(0, begin, count);
        const PanelTop& top = tops[static_cast<size_t>(row * panels + p)];
        EXPECT_NEAR(top.highest + std::log(top.sum), at::logsumexp(part, 0).item<double>(), 1e-5);
        EXPECT_EQ(top.first, begin + part.argmax().item<int64_t>());  // the first of equal ones
      }
    }
  }
}

// Goal: attention over listed blocks sees exactly the positions whose bits are set.
// Oracle: masked softmax in float64 on the same bfloat16 numbers; the weights are rounded to 8 bits.
TEST_F(PairMatmulTest, ListedBlocks) {
  for (const int64_t d : {16, 64, 80}) {
    at::manual_seed(static_cast<uint64_t>(d));
    const int64_t length = 160, group = 16;
    const at::Tensor keys = RandomHalves({length, d}).to(at::kFloat), values = RandomHalves({length, d}).to(at::kFloat);
    const at::Tensor queries = RandomHalves({kPairQueries, d}).to(at::kFloat), out = at::zeros({kPairQueries, d}, at::kBFloat16);
    const at::Tensor key_cache = at::zeros({length, d}, at::kBFloat16), value_cache = at::zeros({length, d}, at::kBFloat16);
    for (int64_t t = 0; t < length; ++t) {
      WritePairKey(Data<float>(keys) + t * d, Data(key_cache), t, d);
      WritePairValue(Data<float>(values) + t * d, Data(value_cache), t, d);
    }
    const std::vector<int32_t> blocks = {0, 2, 3, 5, 6, 9};
    const int64_t count = static_cast<int64_t>(blocks.size());
    const at::Tensor bits = at::rand({kPairQueries, count, group}).lt(0.4);
    bits[1].zero_();
    bits[1][4][15].fill_(true);  // one position alone
    std::vector<uint16_t> seen(static_cast<size_t>(kPairQueries * count));
    const at::Tensor visible = at::zeros({kPairQueries, length}, at::kBool);
    for (int64_t q = 0; q < kPairQueries; ++q) {
      for (int64_t b = 0; b < count; ++b) {
        for (int64_t i = 0; i < group; ++i) {
          if (!bits[q][b][i].item<bool>()) continue;
          seen[static_cast<size_t>(q * count + b)] |= static_cast<uint16_t>(1u << i);
          visible[q][blocks[static_cast<size_t>(b)] * group + i].fill_(true);
        }
      }
    }
    const at::Tensor scratch = at::empty({PairScratchFloats(count * group, d)});
    PairAttentionItem item{.count = kPairQueries, .keys = Data(key_cache), .values = Data(value_cache), .scratch = Data<float>(scratch),
                           .head_dim = d, .scale = 1.0f / std::sqrt(static_cast<float>(d)), .blocks = blocks.data(),
                           .block_count = count};
    for (int q = 0; q < kPairQueries; ++q) {
      item.queries[q] = {.query = Data<float>(queries) + q * d, .out = Data(out) + q * d, .first = 0, .last = 0,
                         .seen = seen.data() + q * count};
    }
    AttendPairs(item);
    const at::Tensor scores = at::mm(queries.to(at::kDouble), keys.to(at::kDouble).t()) / std::sqrt(static_cast<double>(d));
    const at::Tensor weights = scores.masked_fill(visible.logical_not(), -INFINITY).softmax(1);
    EXPECT_LT(MaxDifference(out, at::mm(weights, values.to(at::kDouble))), 0.02) << d;
  }
}

}  // namespace
}  // namespace refinery::kernels
