#include "worker/task/runtime/torch.h"

#include "tests/worker/task/train/fixture.h"

#include <gtest/gtest.h>

#include <random>

#include "common/digest.h"

namespace refinery::train {

std::shared_ptr<model::CausalLm> TinyModel(uint64_t seed, at::ScalarType dtype) {
  const int64_t h = 32, i = 48, heads = 4, kv_heads = 2, d = 8;
  const nlohmann::json json = {{"architectures", {"LlamaForCausalLM"}}, {"model_type", "llama"},
                               {"hidden_size", h}, {"intermediate_size", i}, {"num_hidden_layers", 2},
                               {"num_attention_heads", heads}, {"num_key_value_heads", kv_heads}, {"head_dim", d},
                               {"vocab_size", kTinyVocabulary}, {"max_position_embeddings", 64},
                               {"rms_norm_eps", 1e-5}, {"rope_theta", 10000.0}, {"tie_word_embeddings", true},
                               {"hidden_act", "silu"}, {"eos_token_id", 0}};
  const auto config = model::ModelConfig::FromJson(json);
  RF_CHECK(config.ok());
  const auto source = [=](const std::string& name) -> StatusOr<at::Tensor> {
    const auto ends = [&name](const char* suffix) { return name.find(suffix) != std::string::npos; };
    if (ends("norm")) return at::ones({h});
    std::vector<int64_t> shape = {h, h};
    if (ends("embed_tokens")) shape = {kTinyVocabulary, h};
    if (ends("k_proj") || ends("v_proj")) shape = {kv_heads * d, h};
    if (ends("gate_proj") || ends("up_proj")) shape = {i, h};
    if (ends("down_proj")) shape = {h, i};
    const at::Generator random = at::detail::createCPUGenerator(DeriveSeed(seed, name));
    const double scale = ends("embed_tokens") ? 0.5 : 1.5 / std::sqrt(static_cast<double>(shape[1]));
    return scale * at::randn(shape, random, at::TensorOptions(at::kFloat));
  };
  auto loaded = model::CausalLm::Load(*config, source, {.dtype = dtype});
  RF_CHECK(loaded.ok());
  return *loaded;
}

std::vector<data::EncodedExample> TinyExamples(size_t count, uint64_t seed, const std::string& prefix) {
  std::mt19937_64 random(seed);
  std::vector<data::EncodedExample> examples;
  for (size_t i = 0; i < count; ++i) {
    data::EncodedExample example;
    example.answer_begin = 3 + static_cast<int64_t>(random() % 5);
    const size_t length = static_cast<size_t>(example.answer_begin) + 1 + random() % 6;
    for (size_t t = 0; t < length; ++t) example.tokens.push_back(static_cast<int32_t>(random() % kTinyVocabulary));
    example.key = Join(prefix, i);
    examples.push_back(example);
  }
  return examples;
}

at::Tensor AnswerLogits(const model::CausalLm& model, const data::EncodedExample& example) {
  const at::NoGradGuard no_grad;
  const auto length = static_cast<int64_t>(example.tokens.size());
  const at::Tensor ids = at::tensor(std::vector<int64_t>(example.tokens.begin(), example.tokens.end()), at::kLong);
  const at::Tensor hidden = model.Hidden({.token_ids = ids, .lengths = {length}});
  return model.Logits(hidden.slice(0, example.answer_begin - 1, length - 1));
}

std::shared_ptr<distill::LogitCache> TinyCache(const model::CausalLm& teacher,
                                               const std::vector<data::EncodedExample>& examples,
                                               const std::filesystem::path& folder, int64_t top_k) {
  distill::LogitCacheWriter writer({.teacher_digest = "sha256:teacher", .tokenizer_digest = "sha256:tokenizer",
                                    .vocab_size = kTinyVocabulary, .top_k = top_k});
  for (const data::EncodedExample& example : examples) writer.Add(example.key, AnswerLogits(teacher, example));
  RF_CHECK(writer.Write(folder).ok());
  auto cache = distill::LogitCache::Open(folder);
  RF_CHECK(cache.ok());
  return *cache;
}

std::filesystem::path FreshFolder(const std::string& name) {
  const ::testing::TestInfo* test = ::testing::UnitTest::GetInstance()->current_test_info();
  const std::filesystem::path folder =
      std::filesystem::path(::testing::TempDir()) / "train_test" / test->test_suite_name() / test->name() / name;
  std::filesystem::remove_all(folder);
  std::filesystem::create_directories(folder);
  return folder;
}

TinyRun::TinyRun(int64_t top_k, at::ScalarType dtype) : student(TinyModel(1, dtype)), teacher(TinyModel(2, dtype)) {
  inputs.student = student.get();
  inputs.base_model = "tiny";
  inputs.train = TinyExamples(12, 5, "train/");
  inputs.validation = TinyExamples(5, 6, "validation/");
  inputs.seed = 77;
  std::vector<data::EncodedExample> all = inputs.train;
  all.insert(all.end(), inputs.validation.begin(), inputs.validation.end());
  cache = TinyCache(*teacher, all, FreshFolder("cache"), top_k);
  inputs.teacher = cache.get();
  settings.learning_rate = 0.02;
  settings.lora_rank = 4;
  settings.lora_alpha = 8;
  settings.steps = 6;
  settings.tokens_per_step = 40;
}

bool SameBits(const checkpoint::PeftAdapter& a, const checkpoint::PeftAdapter& b) {
  if (a.pairs.size() != b.pairs.size() || a.pairs.empty()) return false;
  for (const auto& [module, pair] : a.pairs) {
    const auto other = b.pairs.find(module);
    if (other == b.pairs.end()) return false;
    if (!at::equal(pair.a, other->second.a) || !at::equal(pair.b, other->second.b)) return false;
  }
  return true;
}

}  // namespace refinery::train
