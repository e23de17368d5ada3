// PEFT adapters: round trip, the names that PEFT uses, refusals, and merging against float64.
#include "worker/task/runtime/torch.h"
//
#include "worker/task/checkpoint/peft_adapter.h"

#include "tests/support/status_matchers.h"
#include "tests/worker/task/checkpoint/folder_fixture.h"
#include "worker/task/checkpoint/safetensors.h"

namespace refinery::checkpoint {
namespace {

using ::refinery::testing::IsOk;
using ::refinery::testing::StatusIs;
using ::testing::HasSubstr;
using nlohmann::json;

class PeftAdapterTest : public FolderTest {
 protected:
  static PeftAdapter Example() {
    at::manual_seed(3);
    PeftAdapter adapter{.rank = 4, .lora_alpha = 8, .base_model = "some/model"};
    for (const char* module : {"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"})
      adapter.pairs[module] = {at::randn({4, 12}), at::randn({6, 4})};
    return adapter;
  }
  // Loads Example() after a change of its adapter_config.json.
  StatusOr<PeftAdapter> LoadWith(const char* key, const json& value) {
    EXPECT_THAT(SavePeftAdapter(Example(), folder_), IsOk());
    json config = json::parse(*ReadFile(folder_ / "adapter_config.json"));
    config[key] = value;
    Write("adapter_config.json", config.dump());
    return LoadPeftAdapter(folder_);
  }
};

TEST_F(PeftAdapterTest, SurvivesARoundTripUnderPeftsNames) {
  PeftAdapter adapter = Example();
  ASSERT_THAT(SavePeftAdapter(adapter, folder_), IsOk());
  auto file = SafetensorsFile::Open(folder_ / "adapter_model.safetensors");
  ASSERT_THAT(file, IsOk());
  EXPECT_EQ((*file)->tensors().count("base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"), 1u);
  EXPECT_EQ((*file)->metadata().at("format"), "pt");
  json config = json::parse(*ReadFile(folder_ / "adapter_config.json"));
  EXPECT_EQ(config["peft_type"], "LORA");
  EXPECT_EQ(config["target_modules"], json({"q_proj"}));
  auto loaded = LoadPeftAdapter(folder_);
  ASSERT_THAT(loaded, IsOk());
  EXPECT_EQ(loaded->rank, 4);
  EXPECT_EQ(loaded->scale(), 2.0);
  EXPECT_EQ(loaded->base_model, "some/model");
  ASSERT_EQ(loaded->pairs.size(), 2u);
  for (const auto& [module, pair] : adapter.pairs) {
    EXPECT_TRUE(at::equal(loaded->pairs.at(module).a, pair.a));
    EXPECT_TRUE(at::equal(loaded->pairs.at(module).b, pair.b));
  }
}

// PEFT matches a bare name in every layer, so an adapter of uneven layers must name its modules in full.
TEST_F(PeftAdapterTest, UnevenLayersNameTheirModulesInFull) {
  PeftAdapter adapter = Example();
  adapter.pairs["model.layers.1.self_attn.v_proj"] = {at::randn({4, 12}), at::randn({6, 4})};
  EXPECT_EQ(PeftAdapterConfig(adapter)["target_modules"],
            json({"model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj",
                  "model.layers.1.self_attn.v_proj"}));
}

TEST_F(PeftAdapterTest, RsLoraKeepsItsScale) {
  auto adapter = LoadWith("use_rslora", true);
  ASSERT_THAT(adapter, IsOk());
  EXPECT_DOUBLE_EQ(adapter->scale(), 8 / std::sqrt(4.0));
}

TEST_F(PeftAdapterTest, RefusesWhatIsNotPlainLora) {
  const std::map<const char*, json> changes = {{"use_dora", true}, {"bias", "all"}, {"peft_type", "IA3"},
                                               {"rank_pattern", {{"q_proj|k_proj", 2}}}, {"modules_to_save", {"lm_head"}},
                                               {"alpha_pattern", {{"q_proj", "x"}}}, {"lora_bias", true},
                                               {"r", 0}, {"lora_alpha", "x"}};
  for (const auto& [key, value] : changes)
    EXPECT_THAT(LoadWith(key, value), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("adapter_config.json")))
        << key;
  EXPECT_THAT(LoadWith("r", 5), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("rank 5")));
  ASSERT_THAT(WriteSafetensors(folder_ / "adapter_model.safetensors",
                               {{"base_model.model.m.lora_A.weight", at::ones({4, 2})}}),
              IsOk());
  EXPECT_THAT(LoadWith("r", 4), IsOk());  // SavePeftAdapter wrote both files again
  ASSERT_THAT(WriteSafetensors(folder_ / "adapter_model.safetensors",
                               {{"base_model.model.m.lora_A.weight", at::ones({4, 2})}}),
              IsOk());
  EXPECT_THAT(LoadPeftAdapter(folder_), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("m lacks lora_B")));
  EXPECT_THAT(LoadPeftAdapter(folder_ / "none"),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("adapter_config.json")));
}

// The effect of a module: scale * B A, in float64.
at::Tensor Effect(const PeftAdapter& adapter, const std::string& module) {
  const LoraPair& pair = adapter.pairs.at(module);
  return adapter.scale() * at::mm(pair.b.to(at::kDouble), pair.a.to(at::kDouble));
}

// Goal: ranks and alphas by module as in PEFT: the first key that is the end of the name counts.  Oracle: alpha / rank * B A.
TEST_F(PeftAdapterTest, PatternsGiveModulesTheirOwnScale) {
  const std::string zero = "model.layers.0.self_attn.q_proj", one = "model.layers.1.self_attn.q_proj";
  PeftAdapter plain = Example();
  plain.pairs[one] = {at::randn({2, 12}), at::randn({6, 2})};
  ASSERT_THAT(SavePeftAdapter(plain, folder_), IsOk());
  auto config = nlohmann::ordered_json::parse(*ReadFile(folder_ / "adapter_config.json"));
  EXPECT_EQ(config["rank_pattern"], (json{{one, 2}}));  // saved so that PEFT finds the same scale
  EXPECT_EQ(config["alpha_pattern"], (json{{one, 4.0}}));
  auto again = LoadPeftAdapter(folder_);
  ASSERT_THAT(again, IsOk());
  for (const std::string& module : {zero, one}) EXPECT_TRUE(at::allclose(Effect(*again, module), Effect(plain, module), 1e-6, 1e-6));

  config["rank_pattern"] = {{"layers.1.self_attn.q_proj", 2}};
  config["alpha_pattern"] = {{"proj", 1000}, {"^layers.0.self_attn.q_proj", 1000}, {"1.self_attn.q_proj", 3}, {"q_proj", 5}};
  Write("adapter_config.json", config.dump());
  again = LoadPeftAdapter(folder_);
  ASSERT_THAT(again, IsOk());
  const auto expected = [&](const std::string& module, double scale) {
    return scale * at::mm(plain.pairs[module].b.to(at::kDouble), plain.pairs[module].a.to(at::kDouble));
  };
  EXPECT_TRUE(at::allclose(Effect(*again, zero), expected(zero, 5.0 / 4), 1e-6, 1e-6));
  EXPECT_TRUE(at::allclose(Effect(*again, one), expected(one, 3.0 / 2), 1e-6, 1e-6));
  config["use_rslora"] = true;
  Write("adapter_config.json", config.dump());
  EXPECT_THAT(LoadPeftAdapter(folder_), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("use_rslora")));
}

// Goal: a stack has the effect of the sum.  Oracle: the sum in float64.
TEST_F(PeftAdapterTest, StacksAddUp) {
  PeftAdapter first = Example(), second = Example(), third = Example();
  second.rank = 2, second.lora_alpha = 3;
  second.pairs = {{"model.layers.1.self_attn.q_proj", {at::randn({2, 12}), at::randn({6, 2})}},
                  {"model.layers.1.mlp.up_proj", {at::randn({2, 12}), at::randn({9, 2})}}};
  auto stack = StackAdapters({first, second, third});
  ASSERT_THAT(stack, IsOk());
  EXPECT_EQ(stack->pairs.size(), 3u);
  EXPECT_EQ(stack->pairs["model.layers.1.self_attn.q_proj"].a.size(0), 10);
  for (const auto& [module, pair] : stack->pairs) {
    at::Tensor sum = at::zeros({pair.b.size(0), 12}, at::kDouble);
    for (const PeftAdapter* adapter : {&first, &second, &third})
      if (adapter->pairs.count(module) != 0) sum += Effect(*adapter, module);
    EXPECT_TRUE(at::allclose(Effect(*stack, module), sum, 1e-5, 1e-5)) << module;
  }
  EXPECT_EQ(StackAdapters({second})->lora_alpha, 3);
  second.pairs["model.layers.0.self_attn.q_proj"] = {at::randn({2, 13}), at::randn({6, 2})};
  EXPECT_THAT(StackAdapters({first, second}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("model.layers.0.self_attn.q_proj")));
  EXPECT_THAT(StackAdapters({}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no adapter")));
}

// [[1, 2], [3, 4]] + 0.5 * [1, -2]^T [4, 6] = [[3, 5], [-1, -2]], exact in every dtype.
TEST_F(PeftAdapterTest, MergeIsTheFormula) {
  LoraPair pair{at::tensor({4.0f, 6.0f}).view({1, 2}), at::tensor({1.0f, -2.0f}).view({2, 1})};
  at::Tensor weight = at::tensor({1.0f, 2.0f, 3.0f, 4.0f}).view({2, 2});
  at::Tensor expected = at::tensor({3.0f, 5.0f, -1.0f, -2.0f}).view({2, 2});
  for (at::ScalarType dtype : {at::kFloat, at::kHalf, at::kBFloat16})
    EXPECT_TRUE(at::equal(MergeLora(weight.to(dtype), pair, 0.5), expected.to(dtype))) << dtype;
}

// Goal: a merge is computed in float32 and rounded once.  Method: float64 as oracle; bf16 must be its nearest
// neighbour up to what float32 can tell apart.
TEST_F(PeftAdapterTest, MergeRoundsOnce) {
  LoraPair pair = Example().pairs.begin()->second;
  at::Tensor weight = at::randn({6, 12});
  at::Tensor exact = weight.to(at::kDouble) + 2.0 * at::mm(pair.b.to(at::kDouble), pair.a.to(at::kDouble));
  EXPECT_TRUE(at::allclose(MergeLora(weight, pair, 2.0).to(at::kDouble), exact, 1e-6, 1e-6));
  at::Tensor rounded = weight.to(at::kBFloat16);
  exact = rounded.to(at::kDouble) + 2.0 * at::mm(pair.b.to(at::kDouble), pair.a.to(at::kDouble));
  at::Tensor merged = MergeLora(rounded, pair, 2.0);
  EXPECT_EQ(merged.scalar_type(), at::kBFloat16);
  // bf16 has 8 significant bits: half a unit in the last place of a number in [2^e, 2^(e+1)) is 2^(e-8).
  at::Tensor allowed = at::exp2(exact.abs().log2().floor() - 8) + 1e-5;
  EXPECT_TRUE(((merged.to(at::kDouble) - exact).abs() <= allowed).all().item<bool>());
  EXPECT_THROW(MergeLora(at::randn({5, 12}), pair, 1.0), c10::Error);
}

}  // namespace
}  // namespace refinery::checkpoint
