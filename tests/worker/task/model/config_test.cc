#include "worker/task/model/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/status_matchers.h"

namespace refinery::model {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

json Llama() {
  return json::parse(R"({"architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 172,
      "num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 512,
      "max_position_embeddings": 512, "rms_norm_eps": 1e-05, "eos_token_id": 2})");
}

json With(json config, const json& changes) {
  if (!changes.is_null()) config.update(changes);
  return config;
}

// Goal: the spellings of transformers 4 and 5 mean the same.  Method: one llama3 scaling written in both.
TEST(ModelConfigTest, BothSpellingsOfRopeAgree) {
  const json scaling = {{"factor", 8.0}, {"low_freq_factor", 1.0}, {"high_freq_factor", 4.0},
                        {"original_max_position_embeddings", 256}, {"rope_type", "llama3"}};
  json parameters = scaling;
  parameters["rope_theta"] = 500000.0;
  const json four = With(Llama(), {{"rope_theta", 500000.0}, {"rope_scaling", scaling}});
  const json five = With(Llama(), {{"rope_parameters", parameters}});
  for (const json& config : {four, five}) {
    const StatusOr<ModelConfig> read = ModelConfig::FromJson(config);
    ASSERT_TRUE(read.ok()) << read.status();
    EXPECT_EQ(read->rope_theta, 500000.0);
    EXPECT_EQ(read->rope_scaling.type, "llama3");
    EXPECT_EQ(read->rope_scaling.factor, 8.0);
    EXPECT_EQ(read->rope_scaling.original_max_position, 256);
  }
  const StatusOr<ModelConfig> old = ModelConfig::FromJson(With(Llama(), {{"rope_scaling", {{"type", "linear"}, {"factor", 2.0}}}}));
  ASSERT_TRUE(old.ok()) << old.status();
  EXPECT_EQ(old->rope_scaling.type, "linear");
}

TEST(ModelConfigTest, DefaultsFollowTheArchitecture) {
  const StatusOr<ModelConfig> llama = ModelConfig::FromJson(Llama());
  ASSERT_TRUE(llama.ok()) << llama.status();
  EXPECT_EQ(llama->head_dim, 8);
  EXPECT_FALSE(llama->attention_bias || llama->qk_norm || llama->tie_word_embeddings);
  EXPECT_THAT(llama->eos_token_ids, ElementsAre(2));
  const StatusOr<ModelConfig> qwen2 =
      ModelConfig::FromJson(With(Llama(), {{"architectures", {"Qwen2ForCausalLM"}}, {"eos_token_id", {3, 4}},
                                           {"sliding_window", 100}, {"use_sliding_window", false}}));
  ASSERT_TRUE(qwen2.ok()) << qwen2.status();
  EXPECT_TRUE(qwen2->attention_bias && !qwen2->attention_output_bias);
  EXPECT_EQ(qwen2->sliding_window, 0);
  EXPECT_THAT(qwen2->eos_token_ids, ElementsAre(3, 4));
  const StatusOr<ModelConfig> qwen3 = ModelConfig::FromJson(With(Llama(), {{"architectures", {"Qwen3ForCausalLM"}}}));
  ASSERT_TRUE(qwen3.ok()) << qwen3.status();
  EXPECT_TRUE(qwen3->qk_norm);
  EXPECT_EQ(qwen3->head_dim, 128);
  const StatusOr<ModelConfig> mistral =
      ModelConfig::FromJson(With(Llama(), {{"architectures", {"MistralForCausalLM"}}, {"sliding_window", nullptr}}));
  ASSERT_TRUE(mistral.ok()) << mistral.status();
  EXPECT_EQ(mistral->sliding_window, 0);
}

// Goal: windows per layer follow transformers' rules for Qwen2 and Qwen3.  Oracle: the rules, by hand.
TEST(ModelConfigTest, WindowsPerLayer) {
  const auto windows = [](const json& changes) {
    const StatusOr<ModelConfig> read = ModelConfig::FromJson(With(With(Llama(), {{"architectures", {"Qwen2ForCausalLM"}}}), changes));
    EXPECT_TRUE(read.ok()) << read.status();
    std::vector<int64_t> all;
    for (int64_t i = 0; i < 5; ++i) all.push_back(read->WindowOf(i));
    return all;
  };
  const json on = {{"use_sliding_window", true}, {"sliding_window", 8}};
  EXPECT_THAT(windows({}), ElementsAre(0, 0, 0, 0, 0));
  EXPECT_THAT(windows({{"sliding_window", 8}}), ElementsAre(0, 0, 0, 0, 0));
  EXPECT_THAT(windows(on), ElementsAre(0, 0, 0, 0, 0));  // max_window_layers is 28
  EXPECT_THAT(windows(With(on, {{"max_window_layers", 3}})), ElementsAre(0, 0, 0, 8, 8));
  EXPECT_THAT(windows(With(on, {{"max_window_layers", 0}})), ElementsAre(8, 8, 8, 8, 8));
  EXPECT_THAT(windows({{"use_sliding_window", true}, {"max_window_layers", 4}}), ElementsAre(0, 0, 0, 0, 4096));
  EXPECT_THAT(windows({{"use_sliding_window", true}, {"sliding_window", nullptr}, {"max_window_layers", 0}}),
              ElementsAre(0, 0, 0, 0, 0));
  json types(5, "full_attention");
  types[1] = "sliding_attention";
  EXPECT_THAT(windows(With(on, {{"layer_types", types}, {"max_window_layers", 0}})), ElementsAre(0, 8, 0, 0, 0));
}

// Goal: what a silent or null field means is what transformers' configuration classes say.  Oracle: their defaults, by hand.
TEST(ModelConfigTest, SilentAndNullFields) {
  json silent = Llama();
  silent.erase("num_key_value_heads");
  silent["num_attention_heads"] = 32;
  const auto kv_heads = [&](const char* architecture, const json& changes) {
    const StatusOr<ModelConfig> read = ModelConfig::FromJson(With(With(silent, {{"architectures", {architecture}}}), changes));
    return read.ok() ? read->num_kv_heads : 0;
  };
  EXPECT_EQ(kv_heads("LlamaForCausalLM", {}), 32);
  EXPECT_EQ(kv_heads("MistralForCausalLM", {}), 8);
  EXPECT_EQ(kv_heads("Qwen2ForCausalLM", {}), 32);
  EXPECT_EQ(kv_heads("MistralForCausalLM", {{"num_key_value_heads", nullptr}}), 32);
  const StatusOr<ModelConfig> mistral = ModelConfig::FromJson(
      With(Llama(), {{"architectures", {"MistralForCausalLM"}}, {"head_dim", nullptr}, {"use_sliding_window", false}}));
  ASSERT_TRUE(mistral.ok()) << mistral.status();
  EXPECT_EQ(mistral->sliding_window, 4096);  // Mistral knows no use_sliding_window
  EXPECT_EQ(mistral->head_dim, 8);
  // Where both spellings stand, rope_scaling counts; the base within counts more than beside; yarn derives a null factor.
  const StatusOr<ModelConfig> both = ModelConfig::FromJson(With(
      Llama(), {{"rope_theta", 1e4}, {"original_max_position_embeddings", 128}, {"rope_parameters", {{"rope_type", "default"}}},
                {"rope_scaling", {{"type", "yarn"}, {"factor", nullptr}, {"rope_theta", 5e5}, {"beta_fast", nullptr},
                                  {"original_max_position_embeddings", 64}}}}));
  ASSERT_TRUE(both.ok()) << both.status();
  EXPECT_EQ(both->rope_scaling.type, "yarn");
  EXPECT_EQ(both->rope_scaling.factor, 4);  // 512 / 128
  EXPECT_EQ(both->rope_scaling.beta_fast, 32);
  EXPECT_FALSE(both->rope_scaling.attention_factor.has_value());
  EXPECT_EQ(both->rope_theta, 5e5);
}

TEST(ModelConfigTest, ErrorsNameTheFieldAndWhatIsKnown) {
  const auto message = [](const json& config) {
    const StatusOr<ModelConfig> read = ModelConfig::FromJson(config);
    EXPECT_EQ(read.status().code(), absl::StatusCode::kInvalidArgument);
    return Message(read.status());
  };
  EXPECT_THAT(message(With(Llama(), {{"architectures", {"GPT2LMHeadModel"}}})),
              ::testing::AllOf(HasSubstr("GPT2LMHeadModel"), HasSubstr("Qwen3ForCausalLM")));
  json no_size = Llama();
  no_size.erase("hidden_size");
  EXPECT_THAT(message(no_size), HasSubstr("hidden_size"));
  EXPECT_THAT(message(With(Llama(), {{"num_key_value_heads", 3}})), HasSubstr("num_key_value_heads"));
  EXPECT_THAT(message(With(Llama(), {{"hidden_size", "64"}})), HasSubstr("hidden_size"));
  EXPECT_THAT(message(With(Llama(), {{"hidden_act", "gelu"}})), HasSubstr("gelu"));
  EXPECT_THAT(message(With(Llama(), {{"rope_scaling", {{"rope_type", "longrope"}}}})), HasSubstr("longrope"));
  EXPECT_THAT(message(With(Llama(), {{"eos_token_id", 512}})), HasSubstr("eos_token_id"));
  const json qwen2 = With(Llama(), {{"architectures", {"Qwen2ForCausalLM"}}});
  EXPECT_THAT(message(With(qwen2, {{"layer_types", {"full_attention"}}, {"use_sliding_window", true}})), HasSubstr("layer_types"));
  const json sliding(5, "sliding_attention");
  EXPECT_THAT(message(With(qwen2, {{"layer_types", sliding}})), HasSubstr("use_sliding_window"));
  EXPECT_THAT(message(With(qwen2, {{"layer_types", json(5, "linear_attention")}})), HasSubstr("linear_attention"));
  EXPECT_THAT(message(With(qwen2, {{"use_sliding_window", true}, {"sliding_window", 0}})), HasSubstr("null switches it off"));
  const auto scaled = [&](const json& rope) { return message(With(Llama(), {{"rope_parameters", rope}})); };
  EXPECT_THAT(scaled({{"rope_type", "linear"}}), HasSubstr("'factor' is missing"));
  EXPECT_THAT(scaled({{"rope_type", "llama3"}, {"factor", 8}, {"high_freq_factor", 4}}), HasSubstr("low_freq_factor"));
  EXPECT_THAT(scaled({{"rope_type", "yarn"}, {"factor", 4}, {"beta_fast", -1}}), HasSubstr("beta_fast"));
  EXPECT_THAT(scaled({{"rope_type", "linear"}, {"factor", -2}}), HasSubstr("contradictory"));
  EXPECT_THAT(scaled({{"partial_rotary_factor", 0.5}}), HasSubstr("partial_rotary_factor"));
  EXPECT_THAT(scaled({{"full_attention", {{"rope_type", "default"}}}}), HasSubstr("full_attention"));
  EXPECT_THAT(message(With(Llama(), {{"num_hidden_layers", 1 << 20}})), HasSubstr("num_hidden_layers"));
  EXPECT_THAT(message(json::array()), HasSubstr("not a JSON object"));
}

}  // namespace
}  // namespace refinery::model
