// Goal: in deterministic mode a request's tokens and log-probabilities are the same to the last bit, whatever shares its batch.
// Method: a random model large enough for every kernel path, eight requests of very different lengths; each is run alone, then
// in many compositions. The oracle is the run alone.

#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <gtest/gtest.h>

#include <ATen/CPUGeneratorImpl.h>
#include <bit>
#include <random>

#include "tests/support/status_matchers.h"
#include "worker/task/generate/engine.h"

namespace refinery::generate {
namespace {

using ::refinery::testing::IsOk;

constexpr int64_t kVocab = 700;

model::ModelConfig Config() {
  const nlohmann::json json = {{"architectures", {"Qwen3ForCausalLM"}}, {"model_type", "qwen3"},
                               {"vocab_size", kVocab}, {"hidden_size", 160}, {"intermediate_size", 352},
                               {"num_hidden_layers", 3}, {"num_attention_heads", 6}, {"num_key_value_heads", 2},
                               {"head_dim", 32}, {"hidden_act", "silu"}, {"max_position_embeddings", 2048},
                               {"rms_norm_eps", 1e-6}, {"rope_theta", 10000.0}, {"tie_word_embeddings", true},
                               {"eos_token_id", 2}};
  const StatusOr<model::ModelConfig> config = model::ModelConfig::FromJson(json);
  EXPECT_THAT(config, IsOk());
  return *config;
}

std::vector<int64_t> ShapeOf(const std::string& name) {
  const auto has = [&](const char* part) { return name.find(part) != std::string::npos; };
  if (has("q_norm") || has("k_norm")) return {32};
  if (has("norm")) return {160};
  if (has("embed") || has("lm_head")) return {kVocab, 160};
  if (has("q_proj")) return {192, 160};
  if (has("k_proj") || has("v_proj")) return {64, 160};
  if (has("o_proj")) return {160, 192};
  return has("down_proj") ? std::vector<int64_t>{160, 352} : std::vector<int64_t>{352, 160};
}

std::shared_ptr<model::CausalLm> RandomModel(at::ScalarType dtype) {
  const model::TensorSource source = [](const std::string& name) -> StatusOr<at::Tensor> {
    auto generator = at::make_generator<at::CPUGeneratorImpl>(std::hash<std::string>()(name));
    const at::Tensor values = at::randn(ShapeOf(name), generator, at::kFloat);
    return name.find("norm") != std::string::npos ? values * 0.1 + 1 : values * 0.12;
  };
  const auto lm = model::CausalLm::Load(Config(), source, {.dtype = dtype});
  EXPECT_THAT(lm, IsOk());
  return *lm;
}

// Prompts of 1 to 700 tokens, of which three share 300 tokens and two are the same.
std::vector<Request> Requests() {
  std::mt19937 random(5);
  const auto tokens = [&](size_t count) {
    std::vector<int32_t> list(count);
    for (int32_t& token : list) token = static_cast<int32_t>(random() % kVocab);
    return list;
  };
  const std::vector<int32_t> shared = tokens(300);
  std::vector<Request> requests;
  for (size_t length : {1, 3, 40, 256, 257, 700}) requests.push_back({.prompt = tokens(length)});
  for (size_t length : {0, 20, 260}) {
    std::vector<int32_t> prompt = shared, rest = tokens(length);
    prompt.insert(prompt.end(), rest.begin(), rest.end());
    requests.push_back({.prompt = std::move(prompt)});
  }
  requests.push_back(requests[5]);
  for (size_t i = 0; i < requests.size(); ++i) {
    requests[i].max_new_tokens = 6 + 2 * static_cast<int64_t>(i % 3);
    requests[i].sampling = {.temperature = i % 2 == 0 ? 0.0 : 1.0};
    requests[i].seed = 40 + i;
    requests[i].top_log_probs = 3;
  }
  return requests;
}

// Tokens and the bits of all log-probabilities.
std::vector<int64_t> Bits(const Completion& completion) {
  std::vector<int64_t> bits(completion.tokens.begin(), completion.tokens.end());
  for (const TokenLogProb& p : completion.log_probs) {
    bits.push_back(std::bit_cast<int32_t>(p.log_prob));
    for (const auto& [token, log_prob] : p.top) bits.insert(bits.end(), {token, std::bit_cast<int32_t>(log_prob)});
  }
  return bits;
}

class DeterminismTest : public ::testing::TestWithParam<at::ScalarType> {
 protected:
  void SetUp() override {
    lm_ = RandomModel(GetParam());
    requests_ = Requests();
    for (const Request& request : requests_) alone_.push_back(Run({request}, {.max_batch = 1, .deterministic = true})[0]);
  }

  std::vector<std::vector<int64_t>> Run(const std::vector<Request>& requests, const EngineOptions& options) {
    Engine engine(lm_, options);
    runtime::NullReporter reporter;
    const StatusOr<std::vector<Completion>> completions = engine.Generate(requests, reporter);
    EXPECT_THAT(completions, IsOk());
    std::vector<std::vector<int64_t>> bits;
    for (const Completion& completion : *completions) bits.push_back(Bits(completion));
    return bits;
  }

  std::shared_ptr<model::CausalLm> lm_;
  std::vector<Request> requests_;
  std::vector<std::vector<int64_t>> alone_;
};
INSTANTIATE_TEST_SUITE_P(Types, DeterminismTest, ::testing::Values(at::kFloat, at::kBFloat16, at::kDouble));

TEST_P(DeterminismTest, TheSameBitsInEveryBatch) {
  std::mt19937 random(9);
  for (const int64_t max_batch : {2, 3, 5, 16}) {
    for (const int64_t max_step_tokens : {1024, 300}) {
      std::vector<size_t> order;
      for (int64_t i = 0; i < 2 * max_batch; ++i) order.push_back(random() % requests_.size());
      std::vector<Request> batch;
      for (size_t i : order) batch.push_back(requests_[i]);
      const auto bits = Run(batch, {.max_batch = max_batch, .max_step_tokens = max_step_tokens, .deterministic = true});
      for (size_t k = 0; k < order.size(); ++k) EXPECT_EQ(bits[k], alone_[order[k]]) << max_batch << ": request " << order[k];
    }
  }
}

// Requests that join while others decode, that find their prefix in the cache, and whose mates are cancelled.
TEST_P(DeterminismTest, TheSameBitsWhenRequestsComeAndGo) {
  Engine engine(lm_, {.max_batch = 4, .min_capacity = 1024, .deterministic = true});
  std::mt19937 random(10);
  std::vector<size_t> which;
  std::vector<std::vector<int64_t>> bits(40);
  for (size_t i = 0; i < bits.size(); ++i) {
    which.push_back(random() % requests_.size());
    const StatusOr<uint64_t> id = engine.Submit(requests_[which[i]], [&bits, i](const Completion& c) {
      if (c.finish_reason != "cancelled") bits[i] = Bits(c);
    });
    ASSERT_THAT(id, IsOk());
    for (uint32_t steps = random() % 4; steps > 0; --steps) engine.Step();
    if (random() % 5 == 0) engine.Cancel(*id);
  }
  while (engine.Step()) {
  }
  size_t compared = 0;
  for (size_t i = 0; i < bits.size(); ++i) {
    if (bits[i].empty()) continue;
    ++compared;
    EXPECT_EQ(bits[i], alone_[which[i]]) << i << ": request " << which[i];
  }
  EXPECT_GT(compared, 25);
  EXPECT_GT(engine.statistics().reused_tokens, 256);  // prefixes were shared, so that the test covers that
}

}  // namespace
}  // namespace refinery::generate
