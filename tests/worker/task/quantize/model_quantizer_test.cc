#include "worker/task/runtime/torch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <limits>

#include "common/digest.h"
#include "common/files.h"
#include "tests/support/status_matchers.h"
#include "tests/worker/task/quantize/tiny_model.h"
#include "worker/task/quantize/model_quantizer.h"
#include "worker/task/quantize/quantized_artifact.h"

namespace refinery::quantize {
namespace {

using ::refinery::testing::IsOk;
using ::refinery::testing::StatusIs;
using ::refinery::testing::TinyCalibration;
using ::refinery::testing::TinyConfig;
using ::refinery::testing::TinyModel;
using ::refinery::testing::TinyTensors;
using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr GptqSettings kSettings{.bits = 4, .group_size = 32};

// The transformer written out in float64 over one sequence, remembering what each linear layer reads. No code shared with
// the model library.
struct PlainLlama {
  std::map<std::string, at::Tensor> w;
  std::map<std::string, at::Tensor> inputs;

  at::Tensor Apply(const std::string& module, const at::Tensor& x) {
    inputs[module] = x;
    return at::mm(x, w.at(module + ".weight").t());
  }
  at::Tensor Norm(const std::string& name, const at::Tensor& x) {
    return x * at::rsqrt(x.square().mean(1, true) + 1e-5) * w.at(name + ".weight");
  }
  static at::Tensor Rope(const at::Tensor& x) {  // [T, heads, 16]
    const at::Tensor frequency = at::pow(10000.0, -at::arange(0, 16, 2, at::kDouble) / 16);
    const at::Tensor angle = at::outer(at::arange(x.size(0), at::kDouble), frequency).unsqueeze(1);
    const at::Tensor a = x.slice(2, 0, 8), b = x.slice(2, 8);
    return at::cat({a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()}, 2);
  }
  void Forward(const std::vector<int32_t>& ids) {
    const int64_t tokens = static_cast<int64_t>(ids.size());
    at::Tensor h = w.at("model.embed_tokens.weight").index_select(0, at::tensor(ids, at::kLong));
    const at::Tensor mask = at::full({tokens, tokens}, -std::numeric_limits<double>::infinity(), at::kDouble).triu(1);
    for (int layer = 0; layer < 2; ++layer) {
      const std::string p = "model.layers." + std::to_string(layer) + ".";
      at::Tensor x = Norm(p + "input_layernorm", h);
      const at::Tensor q = Rope(Apply(p + "self_attn.q_proj", x).view({tokens, 4, 16}));
      const at::Tensor k = Rope(Apply(p + "self_attn.k_proj", x).view({tokens, 2, 16})).repeat_interleave(2, 1);
      const at::Tensor v = Apply(p + "self_attn.v_proj", x).view({tokens, 2, 16}).repeat_interleave(2, 1);
      const at::Tensor scores = at::matmul(q.transpose(0, 1), k.permute({1, 2, 0})) / 4.0 + mask;
      const at::Tensor context = at::matmul(at::softmax(scores, -1), v.transpose(0, 1)).transpose(0, 1).reshape({tokens, 64});
      h = h + Apply(p + "self_attn.o_proj", context);
      x = Norm(p + "post_attention_layernorm", h);
      const at::Tensor gate = Apply(p + "mlp.gate_proj", x);
      h = h + Apply(p + "mlp.down_proj", gate / (1 + at::exp(-gate)) * Apply(p + "mlp.up_proj", x));
    }
  }
};

// Goal: every layer is quantized from what the already quantized part of the model gives it, in the order q k v, o, gate up,
// down, with all calibration tokens.  Method: the transformer again, in float64, run from the start for each stage with the
// weights quantized so far; its Hessian goes through the same Gptq. A rounding tie may fall the other way in a handful of codes.
TEST(ModelQuantizerTest, EachStageReadsWhatTheQuantizedModelGives) {
  const auto tensors = TinyTensors(at::kFloat);
  const auto calibration = TinyCalibration(30);
  const auto model = TinyModel(tensors, at::kFloat);
  runtime::NullReporter reporter;
  const QuantizedModel ours = QuantizeModel(*model, calibration, kSettings, reporter);
  ASSERT_EQ(ours.linears.size(), 14u);

  PlainLlama plain;
  for (const auto& [name, tensor] : tensors) plain.w[name] = tensor.to(at::kDouble);
  int64_t tokens = 0;
  for (const auto& sequence : calibration) tokens += static_cast<int64_t>(sequence.size());
  EXPECT_EQ(ours.calibration_tokens, tokens);
  for (int layer = 0; layer < 2; ++layer) {
    const std::string p = "model.layers." + std::to_string(layer) + ".";
    for (const std::vector<std::string>& stage : std::vector<std::vector<std::string>>{
             {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
             {"self_attn.o_proj"},
             {"mlp.gate_proj", "mlp.up_proj"},
             {"mlp.down_proj"}}) {
      const int64_t in = plain.w.at(p + stage[0] + ".weight").size(1);
      at::Tensor hessian = at::zeros({in, in}, at::kDouble);
      for (const auto& sequence : calibration) {
        plain.Forward(sequence);
        hessian += at::mm(plain.inputs.at(p + stage[0]).t(), plain.inputs.at(p + stage[0]));
      }
      for (const std::string& name : stage) {
        const QuantizedLinear wanted =
            Gptq(name, plain.w.at(p + name + ".weight"), hessian.to(at::kFloat), kSettings, nullptr);
        const QuantizedLinear& found = ours.linears.at(p + name);
        const double same = found.codes.eq(wanted.codes).to(at::kDouble).mean().item<double>();
        EXPECT_GT(same, 0.995) << p + name;
        // Our result goes on, so that one flipped tie does not spread.
        plain.w[p + name + ".weight"] = found.Dequantize().to(at::kDouble);
      }
    }
  }
}

TEST(ModelQuantizerTest, WeightsBecomeTheDequantizedOnesAndTheArtifactGivesThemBack) {
  const auto tensors = TinyTensors(at::kBFloat16);
  const auto model = TinyModel(tensors, at::kBFloat16);
  runtime::NullReporter reporter;
  const QuantizedModel quantized = QuantizeModel(*model, TinyCalibration(30), kSettings, reporter);
  for (const auto& [module, linear] : quantized.linears) {
    EXPECT_TRUE(at::equal(model->FindLinear(module)->weight, linear.Dequantize().to(at::kBFloat16))) << module;
    const GptqReport& report = quantized.reports.at(module);
    EXPECT_GT(report.relative_error, 0) << module;
    EXPECT_LT(report.relative_error, report.rtn_relative_error) << module;
  }
  const std::filesystem::path folder = std::filesystem::path(::testing::TempDir()) / "quantized_artifact";
  ASSERT_THAT(SaveQuantized(quantized, folder), IsOk());
  const auto loaded = LoadQuantized(folder);
  ASSERT_THAT(loaded, IsOk());
  EXPECT_EQ(loaded->calibration_digest, quantized.calibration_digest);
  EXPECT_EQ(loaded->settings.group_size, 32);
  EXPECT_EQ(loaded->reports.at("model.layers.1.mlp.up_proj").relative_error,
            quantized.reports.at("model.layers.1.mlp.up_proj").relative_error);
  const auto fresh = TinyModel(tensors, at::kBFloat16);
  ASSERT_THAT(ApplyQuantized(*fresh, *loaded), IsOk());
  const model::PackedBatch batch{.token_ids = at::arange(0, 40, at::kLong), .lengths = {25, 15}};
  EXPECT_TRUE(at::equal(fresh->Hidden(batch), model->Hidden(batch)));

  // The same run gives the same bytes.
  const auto again = TinyModel(tensors, at::kBFloat16);
  const std::filesystem::path second = std::filesystem::path(::testing::TempDir()) / "quantized_artifact_again";
  ASSERT_THAT(SaveQuantized(QuantizeModel(*again, TinyCalibration(30), kSettings, reporter), second), IsOk());
  for (const char* file : {"quantized.safetensors", "quantized.json"}) {
    EXPECT_EQ(DigestOfFile(folder / file).value(), DigestOfFile(second / file).value()) << file;
  }
}

// Goal: an artifact of any grid and column order gives its modules back.  Method: codes, scales, zero points and groups of what was
// stored, and the weights that they stand for.
TEST(ModelQuantizerTest, ArtifactsOfEveryGridAndOrderComeBack) {
  for (const Grid grid : {Grid::kFullRange, Grid::kSymmetric, Grid::kAsymmetric}) {
    for (const ColumnOrderKind order : {ColumnOrderKind::kGroups, ColumnOrderKind::kNatural, ColumnOrderKind::kClassic}) {
      SCOPED_TRACE(Join(GridName(grid), ", ", OrderName(order)));
      GptqSettings settings = kSettings;
      settings.grid = grid;
      settings.order = order;
      const auto model = TinyModel(TinyTensors(at::kFloat), at::kFloat);
      runtime::NullReporter reporter;
      const QuantizedModel quantized = QuantizeModel(*model, TinyCalibration(30), settings, reporter);
      const std::filesystem::path folder = std::filesystem::path(::testing::TempDir()) / Join("artifact_", GridName(grid), OrderName(order));
      ASSERT_THAT(SaveQuantized(quantized, folder), IsOk());
      const auto loaded = LoadQuantized(folder);
      ASSERT_THAT(loaded, IsOk());
      for (const auto& [module, linear] : quantized.linears) {
        const QuantizedLinear& back = loaded->linears.at(module);
        EXPECT_TRUE(at::equal(back.codes, linear.codes)) << module;
        EXPECT_TRUE(at::equal(back.scales, linear.scales)) << module;
        EXPECT_EQ(back.zeros.defined(), grid == Grid::kAsymmetric) << module;
        EXPECT_EQ(back.group_index.defined(), order == ColumnOrderKind::kClassic) << module;
        EXPECT_TRUE(at::equal(back.Dequantize(), linear.Dequantize())) << module;
        EXPECT_TRUE(at::equal(back.Dequantize(), model->FindLinear(module)->weight)) << module;
      }
      // What decodes from packed codes multiplies by the same weights.
      const auto packed = TinyModel(TinyTensors(at::kFloat), at::kFloat);
      PackQuantized(*packed, *loaded);
      for (const auto& [module, linear] : quantized.linears) {
        const model::Linear* found = packed->FindLinear(module);
        ASSERT_EQ(found->packed != nullptr, order != ColumnOrderKind::kClassic) << module;
        if (found->packed != nullptr) {
          EXPECT_TRUE(at::allclose(found->packed->Expand(at::kFloat), linear.Dequantize(), 1e-6, 1e-8)) << module;
        }
      }
    }
  }
}

// Goal: NaN where no Hessian sees it is an error with a name.  Method: planted in rows of the embeddings that calibration does not use, in a
// head of its own, in a weight while held-out text is measured.
TEST(ModelQuantizerTest, NumbersThatAreNotFiniteAreNamedWhereverTheyAre) {
  runtime::NullReporter reporter;
  const auto error = [&](model::CausalLm& model) -> std::string {
    const TokenSequences held_out{.ids = TinyCalibration(4), .weights = {}};
    try {
      (void)QuantizeModel(model, {.ids = TinyCalibration(4), .weights = {}}, kSettings, {.held_out = &held_out}, reporter);
    } catch (const runtime::NumericException& e) {
      return e.what();
    }
    return "";
  };
  const float nan = std::nanf("");
  auto model = TinyModel(TinyTensors(at::kFloat), at::kFloat);
  EXPECT_EQ(error(*model), "");
  model = TinyModel(TinyTensors(at::kFloat), at::kFloat);
  model->lm_head = model->lm_head.clone();
  model->lm_head[3][5] = nan;
  EXPECT_THAT(error(*model), AllOf(HasSubstr("lm_head"), HasSubstr("row 3, column 5")));
  model = TinyModel(TinyTensors(at::kFloat), at::kFloat);
  model->embed_tokens[model->embed_tokens.size(0) - 1][0] = nan;
  EXPECT_THAT(error(*model), HasSubstr("model.embed_tokens"));
  model = TinyModel(TinyTensors(at::kFloat), at::kFloat);
  model->layers[1].up.weight[2][7] = std::numeric_limits<float>::infinity();
  EXPECT_THAT(error(*model), AllOf(HasSubstr("model.layers.1.mlp.up_proj"), HasSubstr("row 2, column 7")));
}

TEST(ModelQuantizerTest, WrongArtifactsAreRefusedByName) {
  const auto model = TinyModel(TinyTensors(at::kFloat), at::kFloat);
  QuantizedModel quantized = RoundModelToNearest(*model, kSettings);
  const std::filesystem::path folder = std::filesystem::path(::testing::TempDir()) / "wrong_artifact";
  ASSERT_THAT(SaveQuantized(quantized, folder), IsOk());

  QuantizedModel other = quantized;
  other.linears.erase("model.layers.1.mlp.down_proj");
  EXPECT_THAT(ApplyQuantized(*model, other),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("model.layers.1.mlp.down_proj")));
  other = quantized;
  other.linears["model.layers.7.mlp.down_proj"] = other.linears["model.layers.1.mlp.down_proj"];
  EXPECT_THAT(ApplyQuantized(*model, other), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("15 modules")));

  const std::string facts = ReadFile(folder / "quantized.json").value();
  ASSERT_THAT(WriteFileAtomically(folder / "quantized.json", facts.substr(0, facts.size() / 2)), IsOk());
  EXPECT_THAT(LoadQuantized(folder), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("quantized.json")));
  std::string wrong = facts;
  for (size_t at = wrong.find("\"group_size\": 32"); at != std::string::npos; at = wrong.find("\"group_size\": 32")) {
    wrong.replace(at, 16, "\"group_size\": 16");  // of the whole and of each module
  }
  ASSERT_THAT(WriteFileAtomically(folder / "quantized.json", wrong), IsOk());
  EXPECT_THAT(LoadQuantized(folder), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("scales")));
}

TEST(ModelQuantizerTest, NamesTheFirstModuleWhoseInputsAreNotFinite) {
  auto tensors = TinyTensors(at::kFloat);
  tensors["model.layers.1.post_attention_layernorm.weight"][5] = std::numeric_limits<float>::infinity();
  const auto model = TinyModel(tensors, at::kFloat);
  runtime::NullReporter reporter;
  try {
    QuantizeModel(*model, TinyCalibration(4), kSettings, reporter);
    FAIL() << "accepted an infinite norm weight";
  } catch (const runtime::NumericException& e) {
    EXPECT_THAT(e.what(), AllOf(HasSubstr("model.layers.1.mlp.gate_proj"), HasSubstr("column 5")));
  }
}

class CountingReporter : public runtime::Reporter {
 public:
  explicit CountingReporter(int cancel_after) : cancel_after_(cancel_after) {}
  void Report(const runtime::Progress& progress) override { reports.push_back(progress); }
  void Note(const std::string&, const std::string&) override {}
  void CheckpointReady(const std::string&, uint64_t) override {}
  void Check() override {
    if (cancel_after_-- == 0) throw runtime::CancelledException();
  }
  std::vector<runtime::Progress> reports;

 private:
  int cancel_after_;
};

TEST(ModelQuantizerTest, ReportsProgressAndStopsWhenCancelled) {
  const auto model = TinyModel(TinyTensors(at::kFloat), at::kFloat);
  CountingReporter patient(1 << 20);
  QuantizeModel(*model, TinyCalibration(4), kSettings, patient);
  ASSERT_EQ(patient.reports.size(), 8u);
  EXPECT_EQ(patient.reports[4].phase, "layer 2/2");
  EXPECT_EQ(patient.reports.back().done, patient.reports.back().total);
  CountingReporter impatient(5);
  EXPECT_THROW(QuantizeModel(*model, TinyCalibration(4), kSettings, impatient), runtime::CancelledException);
}

TEST(ModelQuantizerTest, GroupSizeIsCheckedBeforeWorkStarts) {
  nlohmann::json json = TinyConfig();
  const auto check = [&](int64_t bits, int64_t group_size) {
    return CheckGroupSize(model::ModelConfig::FromJson(json).value(), bits, group_size);
  };
  EXPECT_THAT(check(4, 32), IsOk());
  EXPECT_THAT(check(3, -1), IsOk());
  EXPECT_THAT(check(4, 64), IsOk());  // the last group is shorter: allowed, with a note
  const auto note = [&](int64_t group_size) {
    return RaggedGroupsNote(model::ModelConfig::FromJson(json).value(), group_size);
  };
  EXPECT_THAT(note(64), AllOf(HasSubstr("mlp.down_proj"), HasSubstr("96"), HasSubstr("GPTQModel"), HasSubstr("vLLM"),
                              HasSubstr("16, 32, -1")));
  EXPECT_EQ(note(32), "");
  EXPECT_EQ(note(-1), "");
  EXPECT_THAT(check(5, 32), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("bits")));
  EXPECT_THAT(check(4, 0), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("group_size")));
  json["intermediate_size"] = 100;
  EXPECT_THAT(check(4, 4), StatusIs(absl::StatusCode::kInvalidArgument,
                                    AllOf(HasSubstr("mlp.gate_proj"), HasSubstr("100 x 64"))));
}

}  // namespace
}  // namespace refinery::quantize
