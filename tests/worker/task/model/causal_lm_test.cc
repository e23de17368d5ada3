#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "tests/worker/task/model/tiny_models.h"
#include "worker/task/model/causal_lm.h"

namespace refinery::model {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;

at::Tensor Doubles(const json& list) { return at::tensor(list.get<std::vector<double>>(), at::kDouble); }

double MaxDifference(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

class TinyModelTest : public ::testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(All, TinyModelTest, ::testing::ValuesIn(kTinyModels));
INSTANTIATE_TEST_SUITE_P(ForwardOnly, TinyModelTest, ::testing::ValuesIn(kForwardModels));

// Goal: float32 logits equal transformers' (every architecture, rope scaling, bias, window).  Method: committed answers, all
// sequences in one packed batch, so that a leak across borders would show.
TEST_P(TinyModelTest, PackedLogitsEqualTransformers) {
  const c10::InferenceMode inference;
  const json vectors = TinyVectors(GetParam());
  const auto model = TinyModel(vectors, at::kFloat);
  std::vector<std::vector<int64_t>> sequences;
  for (const json& answer : vectors["answers"]) sequences.push_back(answer["ids"].get<std::vector<int64_t>>());
  const PackedBatch batch = Pack(sequences);
  const at::Tensor logits = model->Logits(model->Hidden(batch)).to(at::kDouble);
  int64_t row = 0;
  for (size_t i = 0; i < sequences.size(); row += batch.lengths[i++]) {
    const json& answer = vectors["answers"][i];
    const at::Tensor ours = logits.narrow(0, row, batch.lengths[i]);
    const double range = Doubles(answer["last_logits"]).abs().max().item<double>();
    EXPECT_LT(MaxDifference(ours[-1], Doubles(answer["last_logits"])), 1e-5 * range + 1e-6);
    EXPECT_LT(MaxDifference(ours.logsumexp(1), Doubles(answer["log_sum_exp"])), 1e-5 * range + 1e-6);
    EXPECT_LT(MaxDifference(ours.select(1, 0), Doubles(answer["first_logit"])), 1e-5 * range + 1e-6);
  }
}

// Goal: the ATen path (CUDA, float64) computes the same.  Method: the same answers with a float64 model.
TEST_P(TinyModelTest, PlainPathEqualsTransformers) {
  const c10::InferenceMode inference;
  const json vectors = TinyVectors(GetParam());
  const auto model = TinyModel(vectors, at::kDouble);
  std::vector<std::vector<int64_t>> sequences;
  for (const json& answer : vectors["answers"]) sequences.push_back(answer["ids"].get<std::vector<int64_t>>());
  const PackedBatch batch = Pack(sequences);
  const at::Tensor logits = model->Logits(model->Hidden(batch));
  int64_t row = 0;
  for (size_t i = 0; i < sequences.size(); row += batch.lengths[i++]) {
    const at::Tensor ours = logits.narrow(0, row, batch.lengths[i]).logsumexp(1);
    EXPECT_LT(MaxDifference(ours, Doubles(vectors["answers"][i]["log_sum_exp"])), 2e-5);
  }
}

// Goal: bf16 stays near float32.  Method: mean absolute logit difference over the longest sequence, against the spread.
TEST_P(TinyModelTest, Bfloat16StaysNear) {
  const c10::InferenceMode inference;
  const json vectors = TinyVectors(GetParam());
  const PackedBatch batch = Pack({vectors["answers"].back()["ids"].get<std::vector<int64_t>>()});
  const auto exact = TinyModel(vectors, at::kFloat), rounded = TinyModel(vectors, at::kBFloat16);
  const at::Tensor a = exact->Logits(exact->Hidden(batch)), b = rounded->Logits(rounded->Hidden(batch)).to(at::kFloat);
  EXPECT_LT((a - b).abs().mean().item<double>(), 0.02 * a.std().item<double>());
}

// Goal: the stages that quantization runs one by one are the forward pass.  Method: compare with ForwardLayer.
TEST_P(TinyModelTest, StagesEqualForwardLayer) {
  const c10::InferenceMode inference;
  const json vectors = TinyVectors(GetParam());
  const auto model = TinyModel(vectors, at::kFloat);
  const PackedBatch batch = Pack({{1, 5, 9, 33}, {4, 4, 50, 12, 30, 31, 32, 33, 34}});
  const Rotary rotary = model->MakeRotary(batch.lengths);
  const at::Tensor hidden = model->Embed(batch.token_ids);
  const DecoderLayer& layer = model->layers[1];
  const at::Tensor normed = model->Normalize(hidden, layer.input_norm);
  const at::Tensor context = model->Attend(layer, layer.q(normed), layer.k(normed), layer.v(normed), batch.lengths, rotary);
  const at::Tensor middle = hidden + layer.o(context);
  const at::Tensor normed2 = model->Normalize(middle, layer.post_attention_norm);
  const at::Tensor out = middle + layer.down(at::silu(layer.gate(normed2)) * layer.up(normed2));
  EXPECT_LT(MaxDifference(out, model->ForwardLayer(layer, hidden, batch.lengths, rotary)), 1e-5);
}

// Goal: greedy texts equal transformers', which rotates each new token by the frequencies of its own moment (dynamic scaling
// passes max_position here).  Method: the cached decoder's arithmetic, written as a forward pass over the whole text whose
// rotary embedding is that of single tokens.
TEST_P(TinyModelTest, GreedyTextsEqualTransformers) {
  const c10::InferenceMode inference;
  const json vectors = TinyVectors(GetParam());
  const auto model = TinyModel(vectors, at::kFloat);
  for (size_t i = 0; i < vectors["greedy"].size(); ++i) {
    std::vector<int64_t> ids = vectors["answers"][i]["ids"].get<std::vector<int64_t>>();
    const std::vector<int64_t> expected = vectors["greedy"][i].get<std::vector<int64_t>>();
    const size_t prompt = ids.size();
    while (ids.size() < prompt + expected.size()) {
      const std::vector<int64_t> lengths = {static_cast<int64_t>(ids.size())};
      const Rotary rotary = model->MakeRotary(at::arange(lengths[0], at::kLong));
      at::Tensor hidden = model->Embed(at::tensor(ids, at::kLong));
      for (const DecoderLayer& layer : model->layers) hidden = model->ForwardLayer(layer, hidden, lengths, rotary);
      ids.push_back(model->Logits(model->Normalize(hidden[-1], model->final_norm)).argmax().item<int64_t>());
    }
    EXPECT_EQ(std::vector<int64_t>(ids.begin() + static_cast<int64_t>(prompt), ids.end()), expected) << i;
  }
}

// The pieces of a vocabulary in llama2.c's format: int32 longest; then for each piece a float score, an int32 length, the bytes.
std::vector<std::string> Llama2cPieces(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::vector<std::string> pieces;
  int32_t number = 0, length = 0;
  file.read(reinterpret_cast<char*>(&number), 4);
  while (file.read(reinterpret_cast<char*>(&number), 4) && file.read(reinterpret_cast<char*>(&length), 4)) {
    pieces.emplace_back(static_cast<size_t>(length), '\0');
    file.read(pieces.back().data(), length);
  }
  return pieces;
}

TEST(CausalLmTest, Stories260KLogitsAndStoryEqualTransformers) {
  if (StoriesFolder().empty()) GTEST_SKIP() << "../shared/data/models/stories260K is absent";
  const c10::InferenceMode inference;
  const auto model = StoriesModel(at::kFloat);
  std::ifstream file(StoriesFolder() + "/golden.json");
  const json golden = json::parse(file);
  std::vector<int64_t> ids = golden["ids"].get<std::vector<int64_t>>();
  const at::Tensor logits = model->Logits(model->Hidden(Pack({ids})));
  const at::Tensor first = logits.narrow(0, 0, 64).to(at::kDouble);
  EXPECT_LT(MaxDifference(first.logsumexp(1), Doubles(golden["logsumexp"])), 1e-4);
  for (int64_t t = 0; t < 64; ++t) {
    EXPECT_LT(MaxDifference(first[t].narrow(0, 0, 8), Doubles(golden["logits_first8"][static_cast<size_t>(t)])), 1e-4);
  }
  const at::Tensor greedy = logits.argmax(1);
  ASSERT_EQ(ids.size(), 201u);
  const std::vector<std::string> pieces = Llama2cPieces(StoriesFolder() + "/tok512.bin");
  ASSERT_EQ(pieces.size(), 512u);
  std::string story;
  for (size_t t = 0; t + 1 < ids.size(); ++t) {
    const int64_t next = greedy[static_cast<int64_t>(t)].item<int64_t>();
    EXPECT_EQ(next, ids[t + 1]) << t;
    story += pieces[static_cast<size_t>(next)];
  }
  EXPECT_EQ(story, golden["text"].get<std::string>());
}

// A full set of factors for a model, rank 4, drawn with a fixed seed.
checkpoint::PeftAdapter RandomAdapter(CausalLm& model) {
  at::manual_seed(7);
  checkpoint::PeftAdapter adapter{.rank = 4, .lora_alpha = 8, .base_model = "tiny"};
  for (DecoderLayer& layer : model.layers) {
    for (const Linear* linear : layer.Linears()) {
      adapter.pairs[linear->name] = {at::randn({4, linear->weight.size(1)}) * 0.2, at::randn({linear->weight.size(0), 4}) * 0.2};
    }
  }
  return adapter;
}

at::Tensor Loss(const CausalLm& model) {
  const PackedBatch batch = Pack({{1, 5, 9, 33, 60, 2, 17, 8}, {4, 4, 50}, {4, 4, 51}, {9, 12, 30, 31, 32}});
  const at::Tensor logits = model.Logits(model.Hidden(batch));
  return at::cross_entropy_loss(logits.scalar_type() == at::kBFloat16 ? logits.to(at::kFloat) : logits,
                                at::arange(batch.token_ids.size(0), at::kLong));
}

// Goal: gradients of the hand-written backward passes (projection, norm, rotary, attention, silu) are right.  Oracle:
// LibTorch's autograd in float64 through ATen operators alone, over weights W + s B A.
void CheckGradients(const std::string& name, at::ScalarType dtype, double tolerance, bool scatter_weights) {
  const json vectors = TinyVectors(name);
  const auto model = TinyModel(vectors, dtype), oracle = TinyModel(vectors, at::kDouble);
  checkpoint::PeftAdapter adapter = RandomAdapter(*model);
  std::map<std::string, std::pair<at::Tensor, at::Tensor>> leaves;
  for (auto& [module, pair] : adapter.pairs) {
    const at::Tensor a = pair.a.to(at::kDouble).requires_grad_(), b = pair.b.to(at::kDouble).requires_grad_();
    Linear* linear = oracle->FindLinear(module);
    linear->weight = linear->weight + adapter.scale() * at::mm(b, a);
    leaves[module] = {a, b};
    pair.a.requires_grad_();
    pair.b.requires_grad_();
    if (scatter_weights) model->FindLinear(module)->weight = model->FindLinear(module)->weight.clone();
  }
  ASSERT_TRUE(model->AttachAdapter(adapter).ok());
  const at::Tensor loss = Loss(*model), expected = Loss(*oracle);
  EXPECT_NEAR(loss.item<double>(), expected.item<double>(), tolerance * expected.item<double>());
  loss.backward();
  expected.backward();
  for (const auto& [module, pair] : adapter.pairs) {
    for (const auto& [got, want] : {std::pair{pair.a.grad(), leaves[module].first.grad()},
                                    std::pair{pair.b.grad(), leaves[module].second.grad()}}) {
      ASSERT_TRUE(got.defined()) << module;
      EXPECT_EQ(got.scalar_type(), at::kFloat);
      const double error = (got.to(at::kDouble) - want).norm().item<double>() / want.norm().item<double>();
      EXPECT_LT(error, tolerance) << module;
    }
    EXPECT_FALSE(model->FindLinear(module)->weight.requires_grad());
  }
}

TEST_P(TinyModelTest, GradientsEqualAutogradInFloat64) { CheckGradients(GetParam(), at::kFloat, 2e-4, false); }
TEST_P(TinyModelTest, GradientsHoldForScatteredWeights) { CheckGradients(GetParam(), at::kFloat, 2e-4, true); }
TEST_P(TinyModelTest, GradientsInBfloat16StayNear) { CheckGradients(GetParam(), at::kBFloat16, 0.12, false); }

// Goal: merging is the adapter.  Method: logits with the factors beside the weights, and with them merged, in float32.
TEST(CausalLmTest, MergedEqualsAttached) {
  const c10::InferenceMode inference;
  const json vectors = TinyVectors("qwen2_yarn");
  const auto attached = TinyModel(vectors, at::kFloat), merged = TinyModel(vectors, at::kFloat);
  const checkpoint::PeftAdapter adapter = RandomAdapter(*attached);
  const PackedBatch batch = Pack({{1, 5, 9, 33, 60}});
  const at::Tensor before = merged->Logits(merged->Hidden(batch));
  ASSERT_TRUE(attached->AttachAdapter(adapter).ok());
  ASSERT_TRUE(merged->MergeAdapter(adapter).ok());
  const at::Tensor a = attached->Logits(attached->Hidden(batch)), b = merged->Logits(merged->Hidden(batch));
  EXPECT_LT(MaxDifference(a, b), 1e-4);
  EXPECT_GT(MaxDifference(a, before), 0.1);
}

// Goal: several adapters act together.  Method: a stack attached and a stack merged, against the sum of both merged in float64.
TEST(CausalLmTest, StackedAdaptersAddUp) {
  const c10::InferenceMode inference;
  const json vectors = TinyVectors("qwen3");
  const auto attached = TinyModel(vectors, at::kFloat), merged = TinyModel(vectors, at::kFloat), oracle = TinyModel(vectors, at::kDouble);
  checkpoint::PeftAdapter first = RandomAdapter(*attached), second = RandomAdapter(*attached);
  second.lora_alpha = 3;
  for (auto& [module, pair] : second.pairs) pair.a = pair.a.flip(1).contiguous();
  for (const checkpoint::PeftAdapter* adapter : {&first, &second}) {
    for (const auto& [module, pair] : adapter->pairs) {
      oracle->FindLinear(module)->weight += adapter->scale() * at::mm(pair.b.to(at::kDouble), pair.a.to(at::kDouble));
    }
  }
  const StatusOr<checkpoint::PeftAdapter> stack = checkpoint::StackAdapters({first, second});
  ASSERT_TRUE(stack.ok()) << stack.status();
  ASSERT_TRUE(attached->AttachAdapter(*stack).ok());
  ASSERT_TRUE(merged->MergeAdapter(*stack).ok());
  const PackedBatch batch = Pack({{1, 5, 9, 33, 60}});
  const at::Tensor expected = oracle->Logits(oracle->Hidden(batch));
  EXPECT_LT(MaxDifference(attached->Logits(attached->Hidden(batch)), expected), 1e-3);
  EXPECT_LT(MaxDifference(merged->Logits(merged->Hidden(batch)), expected), 1e-3);
  const Status again = attached->AttachAdapter(first);
  EXPECT_EQ(again.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(Message(again), HasSubstr("stack"));
}

TEST(CausalLmTest, WrongAdaptersAndWeightsAreNamed) {
  const json vectors = TinyVectors("llama");
  const auto model = TinyModel(vectors, at::kFloat);
  checkpoint::PeftAdapter adapter{.rank = 2, .lora_alpha = 2};
  adapter.pairs["model.layers.9.mlp.up_proj"] = {at::zeros({2, 32}), at::zeros({40, 2})};
  EXPECT_THAT(Message(model->AttachAdapter(adapter)), HasSubstr("model.layers.9.mlp.up_proj"));
  adapter.pairs = {{"model.layers.1.mlp.up_proj", {at::zeros({2, 31}), at::zeros({40, 2})}}};
  EXPECT_THAT(Message(model->MergeAdapter(adapter)), HasSubstr("[2, 31]"));

  const TensorSource good = TinyWeights(vectors);
  const auto load = [&](const TensorSource& source) { return CausalLm::Load(TinyConfig(vectors), source, {}).status(); };
  const Status missing = load([&](const std::string& name) -> StatusOr<at::Tensor> {
    if (name == "model.layers.1.mlp.up_proj.weight") return NotFound(name);
    return good(name);
  });
  EXPECT_EQ(missing.code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(Message(missing), HasSubstr("model.layers.1.mlp.up_proj.weight"));
  const Status shape = load([&](const std::string& name) -> StatusOr<at::Tensor> {
    if (name == "model.norm.weight") return at::ones({31});
    return good(name);
  });
  EXPECT_EQ(shape.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(Message(shape), ::testing::AllOf(HasSubstr("model.norm.weight"), HasSubstr("[31]")));
}

}  // namespace
}  // namespace refinery::model
