// Runs of the model quantizer beyond the plain one: layers from disk, finished modules on disk, interrupted and resumed, token
// weights, figures on held-out text, the plan.

#include "worker/task/runtime/torch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>

#include "common/digest.h"
#include "common/files.h"
#include "tests/support/status_matchers.h"
#include "tests/worker/task/quantize/tiny_model.h"
#include "worker/task/quantize/held_out.h"
#include "worker/task/quantize/hessian.h"
#include "worker/task/quantize/mixed_bits.h"
#include "worker/task/quantize/model_quantizer.h"
#include "worker/task/quantize/quantize_journal.h"
#include "worker/task/quantize/quantize_plan.h"
#include "worker/task/quantize/quantized_artifact.h"

namespace refinery::quantize {
namespace {

namespace fs = std::filesystem;
using ::refinery::testing::IsOk;
using ::refinery::testing::StatusIs;
using ::refinery::testing::TinyCalibration;
using ::refinery::testing::TinyConfig;
using ::refinery::testing::TinyModel;
using ::refinery::testing::TinyTensors;
using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr GptqSettings kSettings{.bits = 4, .group_size = 32};

class Recorder : public runtime::Reporter {
 public:
  explicit Recorder(int stop_after = 1 << 30) : stop_after_(stop_after) {}
  void Report(const runtime::Progress&) override {}
  void Note(const std::string& code, const std::string& text) override {
    if (code != "gptq_fallback") notes.push_back(code + ": " + text);  // what the solver did is not looked at here
  }
  void CheckpointReady(const std::string&, uint64_t) override {}
  void Check() override {
    if (stop_after_-- == 0) throw runtime::CancelledException();
  }
  std::vector<std::string> notes;

 private:
  int stop_after_;
};

class QuantizeRunTest : public ::testing::Test {
 protected:
  QuantizeRunTest() {
    fs::remove_all(folder_);
    fs::create_directories(folder_);
    Recorder reporter;
    const auto model = TinyModel(tensors_, at::kBFloat16);
    wanted_ = QuantizeModel(*model, TinyCalibration(30), kSettings, reporter);
  }

  LayerLoader Loader() {
    return [this](int64_t index) {
      const model::TensorSource source = [this](const std::string& name) -> StatusOr<at::Tensor> {
        const auto found = tensors_.find(name);
        if (found == tensors_.end()) return NotFound(name);
        return found->second;
      };
      return model::CausalLm::LoadLayer(model::ModelConfig::FromJson(TinyConfig()).value(), index, source, {});
    };
  }

  Journal OpenJournal(const std::string& name, Recorder& reporter, const std::string& weights = "w") {
    return Journal::Open(folder_ / name, {{"weights", weights}, {"bits", 4}}, reporter).value();
  }

  // What the journal holds is what the undisturbed run in memory gave.
  void ExpectComplete(Journal& journal) {
    Recorder reporter;
    EXPECT_EQ(journal.modules().size(), wanted_.linears.size());
    for (const auto& [module, linear] : wanted_.linears) {
      const auto entry = journal.Read(module, reporter);
      ASSERT_THAT(entry, IsOk());
      ASSERT_TRUE(entry->has_value()) << module;
      EXPECT_TRUE(at::equal((*entry)->linear.codes, linear.codes)) << module;
      EXPECT_TRUE(at::equal((*entry)->linear.scales, linear.scales)) << module;
      EXPECT_EQ((*entry)->report.relative_error, wanted_.reports.at(module).relative_error);
    }
  }

  const fs::path folder_ = fs::path(::testing::TempDir()) / "quantize_run";
  const std::map<std::string, at::Tensor> tensors_ = TinyTensors(at::kBFloat16);
  QuantizedModel wanted_;
};

TEST_F(QuantizeRunTest, LayersFromDiskAndModulesOnDiskGiveTheSameBits) {
  const auto model = TinyModel(tensors_, at::kBFloat16);
  model->layers.clear();
  for (const bool keep_inputs : {true, false}) {
    Recorder reporter;
    Journal journal = OpenJournal(keep_inputs ? "kept" : "again", reporter);
    const auto result = QuantizeModel(*model, {.ids = TinyCalibration(30), .weights = {}}, kSettings,
                                      {.layers = Loader(), .journal = &journal, .keep_inputs = keep_inputs}, reporter);
    ASSERT_THAT(result, IsOk());
    EXPECT_THAT(result->linears, IsEmpty());
    EXPECT_EQ(result->reports.size(), 14u);
    ExpectComplete(journal);
  }
}

// Goal: a run stopped anywhere goes on with the same bits.  Method: stopped after 1, 2, 3, ... checks until one run ends by itself;
// each continues the journal of the one before.
TEST_F(QuantizeRunTest, StoppedAnywhereItGoesOnWithTheSameBits) {
  const auto model = TinyModel(tensors_, at::kBFloat16);
  model->layers.clear();
  for (const int first : {0, 1, 2, 3}) {
    const std::string name = "stopped" + std::to_string(first);
    int stops = 0;
    for (int stop_after = first + 1;; stop_after += 3) {
      Recorder reporter(stop_after);
      Journal journal = OpenJournal(name, reporter);
      EXPECT_THAT(reporter.notes, IsEmpty());
      try {
        const auto result = QuantizeModel(*model, {.ids = TinyCalibration(30), .weights = {}}, kSettings,
                                          {.layers = Loader(), .journal = &journal}, reporter);
        ASSERT_THAT(result, IsOk());
        EXPECT_EQ(result->reports.size(), 14u);
        ExpectComplete(journal);
        break;
      } catch (const runtime::CancelledException&) {
        ++stops;
      }
    }
    EXPECT_GE(stops, 4);
  }
}

TEST_F(QuantizeRunTest, DamagedModulesAreMadeAgainAndForeignJournalsLeftAlone) {
  const auto model = TinyModel(tensors_, at::kBFloat16);
  model->layers.clear();
  Recorder reporter;
  const auto run = [&](Journal& journal, Recorder& notes) {
    ASSERT_THAT(QuantizeModel(*model, {.ids = TinyCalibration(30), .weights = {}}, kSettings,
                              {.layers = Loader(), .journal = &journal}, notes),
                IsOk());
  };
  Journal journal = OpenJournal("journal", reporter);
  run(journal, reporter);
  EXPECT_THAT(reporter.notes, IsEmpty());

  // One file shorter, one with a flipped bit in its last tensor.
  const fs::path shorter = folder_ / "journal" / "model.layers.0.self_attn.k_proj.safetensors";
  const fs::path flipped = folder_ / "journal" / "model.layers.1.mlp.up_proj.safetensors";
  fs::resize_file(shorter, fs::file_size(shorter) - 7);
  std::string bytes = ReadFile(flipped).value();
  bytes.back() = static_cast<char>(bytes.back() ^ 0x10);
  ASSERT_THAT(WriteFileAtomically(flipped, bytes), IsOk());
  Recorder second;
  Journal again = OpenJournal("journal", second);
  run(again, second);
  EXPECT_THAT(second.notes, ElementsAre(AllOf(HasSubstr("journal_damaged"), HasSubstr("layers.0.self_attn.k_proj")),
                                        AllOf(HasSubstr("journal_damaged"), HasSubstr("layers.1.mlp.up_proj"), HasSubstr("digest"))));
  ExpectComplete(again);

  // Published as a checkpoint, it is taken over whole by another worker; not by a run over other weights.
  ASSERT_THAT(again.Publish("layer-0002"), IsOk());
  Recorder third;
  Journal elsewhere = OpenJournal("elsewhere", third);
  ASSERT_THAT(elsewhere.Adopt(folder_ / "layer-0002", third), IsOk());
  EXPECT_THAT(third.notes, IsEmpty());
  ExpectComplete(elsewhere);
  Recorder fourth;
  Journal other = OpenJournal("other", fourth, "other weights");
  ASSERT_THAT(other.Adopt(folder_ / "layer-0002", fourth), IsOk());
  EXPECT_THAT(fourth.notes, ElementsAre(AllOf(HasSubstr("journal_ignored"), HasSubstr("'weights'"), HasSubstr("other weights"))));
  EXPECT_THAT(other.modules(), IsEmpty());
  // The same file under a journal of that name: its own fingerprint gives it away.
  fs::copy_file(flipped, folder_ / "other" / flipped.filename());
  Recorder fifth;
  Journal fooled = OpenJournal("other", fifth, "other weights");
  EXPECT_FALSE(fooled.Read("model.layers.1.mlp.up_proj", fifth).value().has_value());
  EXPECT_THAT(fifth.notes, ElementsAre(HasSubstr("another run")));
  // Opening a folder that holds another run's journal starts it anew.
  Recorder sixth;
  EXPECT_THAT(OpenJournal("journal", sixth, "other weights").modules(), IsEmpty());
  EXPECT_THAT(sixth.notes, ElementsAre(HasSubstr("journal_ignored")));
}

// Goal: padding does not count.  Method: sequences padded on the right with weight 0 against the same without.
TEST_F(QuantizeRunTest, TokensOfWeightZeroAreSeenByNoHessian) {
  TokenSequences padded{.ids = TinyCalibration(30), .weights = {}};
  for (std::vector<int32_t>& ids : padded.ids) {
    std::vector<float> weights(ids.size(), 1.0f);
    weights.resize(48, 0.0f);
    ids.resize(48, 3);
    padded.weights.push_back(weights);
  }
  Recorder reporter;
  const auto plain = TinyModel(TinyTensors(at::kFloat), at::kFloat);
  const QuantizedModel wanted = QuantizeModel(*plain, TinyCalibration(30), kSettings, reporter);
  const auto model = TinyModel(TinyTensors(at::kFloat), at::kFloat);
  const auto found = QuantizeModel(*model, padded, kSettings, {}, reporter);
  ASSERT_THAT(found, IsOk());
  EXPECT_EQ(found->calibration_tokens, wanted.calibration_tokens);
  for (const auto& [module, linear] : wanted.linears) {
    const double same = found->linears.at(module).codes.eq(linear.codes).to(at::kDouble).mean().item<double>();
    EXPECT_GT(same, 0.99) << module;  // sums in another order: a tie may fall the other way
    EXPECT_NEAR(found->reports.at(module).relative_error, wanted.reports.at(module).relative_error,
                1e-2 * wanted.reports.at(module).relative_error);
  }
}

// Goal: a weight of 4 counts as four copies.  Method: Hessians of one layer's four stages, half of the sequences four times against
// once with weight 4.
TEST_F(QuantizeRunTest, AWeightIsANumberOfCopies) {
  TokenSequences weighted{.ids = TinyCalibration(12), .weights = {}}, copied = weighted;
  for (size_t i = 0; i < weighted.ids.size(); ++i) {
    weighted.weights.emplace_back(weighted.ids[i].size(), i < 6 ? 1.0f : 4.0f);
    for (int copy = 1; i >= 6 && copy < 4; ++copy) copied.ids.push_back(weighted.ids[i]);
  }
  const auto model = TinyModel(TinyTensors(at::kFloat), at::kFloat);
  Activations first(*model, weighted, true), second(*model, copied, true);
  for (const Stage stage : kStages) {
    const auto hessian = [&](Activations& activations) {
      Hessian sum(LinearsOf(model->layers[0], stage)[0]->inputs(), at::kCPU);
      for (Chunk& chunk : activations.chunks()) {
        activations.Advance(model->layers[0], stage, chunk);
        sum.Add(Activations::Counted(chunk, chunk.input));
      }
      return sum.Matrix();
    };
    const at::Tensor found = hessian(first), wanted = hessian(second);
    EXPECT_LT((found - wanted).abs().max().item<double>(), 1e-5 * wanted.abs().max().item<double>()) << StageName(stage);
  }
  EXPECT_LT(first.tokens(), second.tokens());
}

// Goal: perplexity and KL are those of the definition.  Method: whole forward passes of the source and of the quantized model, the
// formulas in float64.
TEST_F(QuantizeRunTest, HeldOutFiguresAreThoseOfTheDefinition) {
  const TokenSequences held_out{.ids = TinyCalibration(9), .weights = {}};
  const auto source = TinyModel(TinyTensors(at::kFloat), at::kFloat), model = TinyModel(TinyTensors(at::kFloat), at::kFloat);
  const auto rounded = TinyModel(TinyTensors(at::kFloat), at::kFloat);
  const GptqSettings settings{.bits = 2, .group_size = 32};
  Recorder reporter;
  const auto result =
      QuantizeModel(*model, {.ids = TinyCalibration(30), .weights = {}}, settings, {.held_out = &held_out}, reporter);
  ASSERT_THAT(result, IsOk());
  RoundModelToNearest(*rounded, settings);
  const model::CausalLm* models[3] = {source.get(), model.get(), rounded.get()};
  double loss[3] = {}, kl[3] = {};
  int64_t count = 0;
  for (const std::vector<int32_t>& ids : held_out.ids) {
    const at::Tensor tokens = at::tensor(std::vector<int64_t>(ids.begin(), ids.end()), at::kLong);
    const auto length = static_cast<int64_t>(ids.size());
    at::Tensor p[3];
    for (int m = 0; m < 3; ++m) {
      const at::Tensor hidden = models[m]->Hidden({.token_ids = tokens, .lengths = {length}});
      p[m] = at::softmax(at::mm(hidden.to(at::kDouble), models[m]->lm_head.t().to(at::kDouble)), 1);
      for (int64_t t = 0; t + 1 < length; ++t) {
        loss[m] -= std::log(p[m][t][ids[static_cast<size_t>(t) + 1]].item<double>());
        kl[m] += (p[0][t] * (p[0][t] / p[m][t]).log()).sum().item<double>();
      }
    }
    count += length - 1;
  }
  ASSERT_TRUE(result->held_out.has_value());
  const HeldOutFigures& f = *result->held_out;
  EXPECT_EQ(f.tokens, count);
  const auto n = static_cast<double>(count);
  EXPECT_NEAR(f.source_perplexity, std::exp(loss[0] / n), 1e-4 * std::exp(loss[0] / n));
  EXPECT_NEAR(f.quantized_perplexity, std::exp(loss[1] / n), 1e-4 * std::exp(loss[1] / n));
  EXPECT_NEAR(f.rounded_perplexity, std::exp(loss[2] / n), 1e-4 * std::exp(loss[2] / n));
  EXPECT_NEAR(f.quantized_kl, kl[1] / n, 1e-4 * kl[1] / n);
  EXPECT_NEAR(f.rounded_kl, kl[2] / n, 1e-4 * kl[2] / n);
  EXPECT_GT(f.rounded_kl, f.quantized_kl);
  const Fidelity whole = MeasureFidelity(*source, *model, held_out);
  EXPECT_EQ(whole.tokens, count);
  EXPECT_NEAR(whole.source_perplexity, std::exp(loss[0] / n), 1e-4 * std::exp(loss[0] / n));
  EXPECT_NEAR(whole.perplexity, std::exp(loss[1] / n), 1e-4 * std::exp(loss[1] / n));
  EXPECT_NEAR(whole.kl, kl[1] / n, 1e-4 * kl[1] / n);
}

// Goal: GPTAQ's matrix is that of its definition.  Method: with alpha 1 and calibration inputs that differ (a model whose first layers
// are already coarse), the output error to the native outputs falls below that of alpha 0.
TEST_F(QuantizeRunTest, TheNativeStreamBringsOutputsNearerToTheNativeOnes) {
  const TokenSequences calibration{.ids = TinyCalibration(60), .weights = {}};
  const auto source = TinyModel(TinyTensors(at::kFloat), at::kFloat);
  double distance[2] = {};
  for (const int alpha : {0, 1}) {
    const auto model = TinyModel(TinyTensors(at::kFloat), at::kFloat);
    GptqSettings settings{.bits = 2, .group_size = 32};
    settings.alpha = alpha;
    Recorder reporter;
    ASSERT_THAT(QuantizeModel(*model, calibration, settings, {}, reporter), IsOk());
    for (const std::vector<int32_t>& ids : calibration.ids) {
      const model::PackedBatch batch{.token_ids = at::tensor(std::vector<int64_t>(ids.begin(), ids.end()), at::kLong),
                                     .lengths = {static_cast<int64_t>(ids.size())}};
      distance[alpha] += (model->Hidden(batch) - source->Hidden(batch)).square().sum().item<double>();
    }
  }
  EXPECT_LT(distance[1], distance[0]);
}

// Goal: the allotment is the best there is.  Method: all 4^6 choices of six random groups, for many budgets.
TEST(MixedBitsTest, AllotsLikeExhaustiveSearch) {
  at::manual_seed(3);
  std::vector<BitsGroup> groups(6);
  for (BitsGroup& group : groups) {
    const int64_t size = at::randint(1, 9, {1}).item<int64_t>() * 100;
    double loss = at::rand({1}).item<double>() * 10;
    for (const int64_t bits : {2, 3, 4, 8}) {
      group.options.push_back({.bits = bits, .bytes = size * bits, .loss = loss});
      loss *= at::rand({1}).item<double>() * 0.8;
    }
  }
  int64_t least = 0, most = 0;
  for (const BitsGroup& group : groups) {
    least += group.options.front().bytes;
    most += group.options.back().bytes;
  }
  for (int64_t budget = least; budget <= most + 100; budget += 170) {
    double best = INFINITY;
    for (int code = 0; code < 4096; ++code) {
      int64_t bytes = 0;
      double loss = 0;
      for (int g = 0; g < 6; ++g) {
        const BitsOption& option = groups[static_cast<size_t>(g)].options[static_cast<size_t>(code >> (2 * g) & 3)];
        bytes += option.bytes;
        loss += option.loss;
      }
      if (bytes <= budget) best = std::min(best, loss);
    }
    const auto chosen = AllotBits(groups, budget);
    ASSERT_THAT(chosen, IsOk());
    int64_t bytes = 0;
    double loss = 0;
    for (size_t g = 0; g < 6; ++g) {
      bytes += groups[g].options[(*chosen)[g]].bytes;
      loss += groups[g].options[(*chosen)[g]].loss;
    }
    EXPECT_LE(bytes, budget);
    EXPECT_NEAR(loss, best, 1e-12);
  }
  EXPECT_THAT(AllotBits(groups, least - 1), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("2 bits everywhere")));
}

// Goal: a group's loss is about the KL that it costs.  Method: the model with that group alone quantized, run whole and held against the
// source: within a factor of two.
TEST_F(QuantizeRunTest, LossesAreAboutTheKlOfAGroupAlone) {
  const auto source = TinyModel(tensors_, at::kFloat);
  const TokenSequences tokens{.ids = TinyCalibration(60), .weights = {}};
  const GptqSettings settings{.bits = 3, .group_size = 32, .refine_sweeps = 0};
  Recorder reporter;
  const auto groups = MeasureBits(*source, {}, tokens, settings, {3, 8}, reporter);
  ASSERT_THAT(groups, IsOk());
  const auto whole = TinyModel(tensors_, at::kFloat);
  const auto quantized = QuantizeModel(*whole, tokens, settings, QuantizeOptions{}, reporter);
  ASSERT_THAT(quantized, IsOk());
  for (const BitsGroup& group : *groups) {
    const auto model = TinyModel(tensors_, at::kFloat);
    for (const std::string& module : group.modules) model->FindLinear(module)->weight.copy_(quantized->linears.at(module).Dequantize());
    const double kl = MeasureFidelity(*source, *model, tokens).kl;
    EXPECT_GT(group.options[0].loss, kl / 2) << group.name;
    EXPECT_LT(group.options[0].loss, kl * 2) << group.name;
    EXPECT_LT(group.options[1].loss, kl / 100) << group.name;
  }
}

// Goal: a budget below the narrowest width is refused, one at it is not.  Method: the tiny model's layers at 3 bits in groups of 32, counted
// by hand: 64 x 64, 64 x 64 (o), 2 x 32 x 64, 2 x 96 x 64 and 64 x 96 weights in each of two layers.
TEST_F(QuantizeRunTest, BudgetsBelowTheNarrowestWidthAreRefused) {
  const model::ModelConfig config = TinyModel(tensors_, at::kBFloat16)->config();
  ASSERT_EQ(config.hidden_size, 64);
  ASSERT_EQ(config.intermediate_size, 96);
  const int64_t weights = 2 * (64 * 64 * 2 + 2 * 32 * 64 + 3 * 96 * 64), least = (weights * 3 + weights / 32 * 19) / 8;
  const SizeOf size = [](int64_t out, int64_t in, int64_t bits) { return ModuleBytes(out, in, bits, 32); };
  EXPECT_THAT(CheckBudget(config, size, {3, 8}, {.bytes = least}), IsOk());
  EXPECT_THAT(CheckBudget(config, size, {3, 8}, {.bytes = least - 1}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(Join("quantize.gptq.bytes_budget is ", least - 1, ", but 3 bits"))));
  EXPECT_THAT(CheckBudget(config, size, {3, 8}, {.bits_per_weight = 3 + 19.0 / 32}), IsOk());
  EXPECT_THAT(CheckBudget(config, size, {3, 8}, {.bits_per_weight = 3.5}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("3.594 bits a weight")));
  EXPECT_THAT(CheckBudget(config, size, {2, 3}, {.bits_per_weight = 3.5}), IsOk());
}

// Goal: losses fall with bits, fused layers are one group, sizes are those of the stored tensors, and the chosen widths arrive.
TEST_F(QuantizeRunTest, MeasuresEveryFusedGroupAndQuantizesItSo) {
  const auto model = TinyModel(tensors_, at::kBFloat16);
  Recorder reporter;
  const auto groups = MeasureBits(*model, Loader(), {.ids = TinyCalibration(30), .weights = {}}, kSettings, {2, 3, 4, 8}, reporter);
  ASSERT_THAT(groups, IsOk());
  ASSERT_EQ(groups->size(), 8u);
  EXPECT_THAT((*groups)[4].modules, ElementsAre("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.k_proj",
                                                "model.layers.1.self_attn.v_proj"));
  for (const BitsGroup& group : *groups) {
    for (size_t o = 0; o + 1 < group.options.size(); ++o) {
      EXPECT_GT(group.options[o].loss, 2 * group.options[o + 1].loss) << group.name;
      EXPECT_LT(group.options[o].bytes, group.options[o + 1].bytes) << group.name;
    }
  }
  // q 64 x 64, k and v 32 x 64 at 3 bits in two groups of 32: 8192 weights x 3 bits, 128 x 2 scales and zero points of 19.
  EXPECT_EQ((*groups)[4].options[1].bytes, (8192 * 3 + 256 * 19) / 8);
  const int64_t budget = BudgetBytes(*groups, {.bits_per_weight = 4.5});
  const auto chosen = AllotBits(*groups, budget);
  ASSERT_THAT(chosen, IsOk());
  const std::map<std::string, int64_t> bits = BitsByModule(*groups, *chosen);
  ASSERT_EQ(bits.size(), 14u);
  const auto result = QuantizeModel(*model, {.ids = TinyCalibration(30), .weights = {}}, kSettings, {.bits = bits}, reporter);
  ASSERT_THAT(result, IsOk());
  EXPECT_LE(QuantizedBytes(*result), budget);
  EXPECT_GT(QuantizedBytes(*result), budget * 8 / 10);
  for (const auto& [module, linear] : result->linears) EXPECT_EQ(linear.bits, bits.at(module)) << module;
  EXPECT_EQ(bits.at("model.layers.0.mlp.gate_proj"), bits.at("model.layers.0.mlp.up_proj"));
  // The artifact gives every module's own width back, from memory and from a journal.
  ASSERT_THAT(SaveQuantized(*result, folder_ / "memory"), IsOk());
  const auto loaded = LoadQuantized(folder_ / "memory");
  ASSERT_THAT(loaded, IsOk());
  const auto fresh = TinyModel(tensors_, at::kBFloat16);
  Journal journal = OpenJournal("mixed", reporter);
  const auto streamed = QuantizeModel(*fresh, {.ids = TinyCalibration(30), .weights = {}}, kSettings,
                                      {.layers = Loader(), .journal = &journal, .bits = bits}, reporter);
  ASSERT_THAT(streamed, IsOk());
  ASSERT_THAT(SaveQuantized(*streamed, journal, folder_ / "journal_artifact", reporter), IsOk());
  for (const char* file : {"quantized.safetensors", "quantized.json"}) {
    EXPECT_EQ(DigestOfFile(folder_ / "memory" / file).value(), DigestOfFile(folder_ / "journal_artifact" / file).value()) << file;
  }
  for (const auto& [module, linear] : result->linears) {
    EXPECT_EQ(loaded->linears.at(module).bits, linear.bits);
    EXPECT_TRUE(at::equal(loaded->linears.at(module).codes, linear.codes)) << module;
  }
}

model::ModelConfig SmolConfig() {
  nlohmann::json json = TinyConfig();
  json.update({{"hidden_size", 576}, {"intermediate_size", 1536}, {"num_hidden_layers", 30}, {"num_attention_heads", 9},
               {"num_key_value_heads", 3}, {"head_dim", 64}, {"vocab_size", 49152}});
  return model::ModelConfig::FromJson(json).value();
}

TEST(QuantizePlanTest, CountsWeightsAndActivations) {
  const model::ModelConfig config = SmolConfig();
  const int64_t layer = 2 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536), table = 2 * 49152 * 576;
  const MemoryEstimate streamed = EstimateMemory(config, {.calibration_tokens = 65536});
  EXPECT_EQ(streamed.weights, table + layer);
  EXPECT_EQ(streamed.activations, 65536 * 2 * (576 + 1536));
  EXPECT_EQ(EstimateMemory(config, {.calibration_tokens = 65536, .streamed = false}).weights, table + 30 * layer);
  EXPECT_EQ(EstimateMemory(config, {.calibration_tokens = 65536, .keep_inputs = false}).activations, 65536 * 2 * (576 + 576));
}

TEST(QuantizePlanTest, KeepsWithinTheBudgetOrNamesWhatWouldFit) {
  const model::ModelConfig config = SmolConfig();
  const Rates rates{.forward = 1e11, .hessian = 1e11, .factor = 1e10, .columns = 1e10};
  const int64_t plenty = EstimateMemory(config, {.calibration_tokens = 65536}).Total();
  const int64_t least = EstimateMemory(config, {.calibration_tokens = 65536, .keep_inputs = false}).Total();
  ASSERT_LT(least, plenty);
  const auto plan = [&](int64_t budget) { return MakePlan(config, {.calibration_tokens = 65536}, budget, rates); };
  EXPECT_TRUE(plan(0)->keep_inputs);
  EXPECT_TRUE(plan(plenty)->keep_inputs);
  EXPECT_FALSE(plan(plenty - 1)->keep_inputs);
  EXPECT_EQ(plan(least)->memory.Total(), least);
  const auto refused = plan(least - (30 << 20));
  ASSERT_THAT(refused, StatusIs(absl::StatusCode::kFailedPrecondition, AllOf(HasSubstr("memory_mib"), HasSubstr("calibration_tokens"))));
  // What it proposes does fit, and a quarter more does not.
  const std::string text = Message(refused.status());
  const int64_t proposed = std::stoll(text.substr(text.find("calibration_tokens ") + 19));
  EXPECT_GE(proposed, 1024);
  EXPECT_THAT(MakePlan(config, {.calibration_tokens = proposed}, least - (30 << 20), rates), IsOk());
  EXPECT_FALSE(MakePlan(config, {.calibration_tokens = proposed * 5 / 4}, least - (30 << 20), rates).ok());
  EXPECT_FALSE(plan(1 << 20).ok());
}

// Goal: a size budget's measurement counts.  Method: it keeps a copy of 512 tokens' hidden states per layer and two more layers' weights;
// with few calibration tokens and a wide vocabulary aside that is the larger moment, with many it is not.
TEST(QuantizePlanTest, MeasuringWidthsCounts) {
  const model::ModelConfig config = SmolConfig();
  const int64_t layer = 2 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536), table = 2 * 49152 * 576;
  const MemoryEstimate few = EstimateMemory(config, {.calibration_tokens = 8192, .width_tokens = 8192, .copied_tokens = 512});
  EXPECT_EQ(few.weights, table + 3 * layer);
  EXPECT_EQ(few.activations, 8192 * 2 * (576 + 1536) + 2 * 512 * 576 * 32);
  const MemoryEstimate many = EstimateMemory(config, {.calibration_tokens = 65536, .width_tokens = 8192, .copied_tokens = 512});
  EXPECT_EQ(many.Total(), EstimateMemory(config, {.calibration_tokens = 65536}).Total());
  EXPECT_EQ(CopiedTokens(256), 512);
  EXPECT_EQ(CopiedTokens(300), 600);
}

TEST(QuantizePlanTest, SecondsGrowWithTokensAndFallWithRates) {
  const model::ModelConfig config = SmolConfig();
  const Rates rates{.forward = 1e11, .hessian = 1e11, .factor = 1e10, .columns = 1e10};
  Rates twice{.forward = 2e11, .hessian = 2e11, .factor = 2e10, .columns = 2e10};
  const double one = EstimateLayerSeconds(config, {.calibration_tokens = 65536}, rates);
  EXPECT_NEAR(EstimateLayerSeconds(config, {.calibration_tokens = 65536}, twice), one / 2, 1e-9);
  // Forward: 3.5 million weights x 65,536 tokens / 1e11 = 2.32 s; Hessians add (3 x 576^2 + 1536^2) / 2 x 65,536 / 1e11 = 1.1 s.
  EXPECT_GT(one, 3.4);
  EXPECT_LT(one, 7);
}

}  // namespace
}  // namespace refinery::quantize
