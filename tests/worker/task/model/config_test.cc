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
  config.update(changes);
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
  EXPECT_THAT(message(With(Llama(), {{"architectures", {"Qwen2ForCausalLM"}}, {"sliding_window", 8},
                                     {"use_sliding_window", true}, {"max_window_layers", 2}})),
              HasSubstr("sliding_window"));
  EXPECT_THAT(message(json::array()), HasSubstr("not a JSON object"));
}

}  // namespace
}  // namespace refinery::model
