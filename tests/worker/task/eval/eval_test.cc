// Scoring and its statistics without a model file: token trees, windows, wiki text, accuracies, and tiny random models
// whose pass over trees must give what their pass over whole sequences gives.
#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <cmath>

#include "tests/support/status_matchers.h"
#include "worker/task/eval/kl.h"
#include "worker/task/eval/multiple_choice.h"
#include "worker/task/eval/perplexity.h"
#include "worker/task/eval/prefix_tree.h"
#include "worker/task/eval/scorer.h"
#include "worker/task/eval/tree_forward.h"
#include "tests/worker/task/model/tiny_models.h"

namespace refinery::eval {
namespace {

using ::refinery::testing::IsOk;
using ::refinery::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

// Goal: whatever is shared, each wanted node stands at the end of a path that spells its own sequence.
// Method: walk the parents of every wanted node back to the root, for random sequences with long common prefixes.
TEST(PrefixTreeTest, EveryPathSpellsItsSequence) {
  at::manual_seed(3);
  std::vector<TreeSequence> sequences;
  for (int i = 0; i < 200; ++i) {
    std::vector<int32_t> tokens(static_cast<size_t>(1 + i % 37), 5);
    const at::Tensor tail = at::randint(0, 3, {static_cast<int64_t>(1 + i % 11)}, at::kInt);
    tokens.insert(tokens.end(), tail.data_ptr<int32_t>(), tail.data_ptr<int32_t>() + tail.numel());
    sequences.push_back({tokens, 1 + i % 3});
    if (sequences.back().kept > static_cast<int64_t>(tokens.size())) sequences.back().kept = 1;
  }
  const TreeLimits limits{.batch_tokens = 100, .block_tokens = 60, .min_shared = 4};
  size_t seen = 0;
  int64_t nodes = 0, tokens = 0;
  for (const TreeBatch& batch : PlanTrees(sequences, limits)) {
    nodes += static_cast<int64_t>(batch.token_ids.size());
    for (const TreePath& path : batch.paths) {
      const TreeSequence& sequence = sequences[path.sequence];
      tokens += static_cast<int64_t>(sequence.tokens.size());
      ++seen;
      ASSERT_EQ(static_cast<int64_t>(path.nodes.size()), sequence.kept);
      const TreeBlock* home = nullptr;
      for (const TreeBlock& block : batch.blocks) {
        if (block.begin <= path.nodes.back()) home = &block;
      }
      std::vector<int32_t> spelled;
      for (int64_t at = path.nodes.back() - home->begin; at >= 0; at = home->parents[static_cast<size_t>(at)]) {
        const size_t node = static_cast<size_t>(home->begin + at);
        spelled.push_back(static_cast<int32_t>(batch.token_ids[node]));
        EXPECT_EQ(batch.positions[node], static_cast<int64_t>(sequence.tokens.size() - spelled.size()));
      }
      EXPECT_EQ(std::vector<int32_t>(spelled.rbegin(), spelled.rend()), sequence.tokens);
    }
  }
  EXPECT_EQ(seen, sequences.size());
  EXPECT_LT(nodes, tokens / 2);
}

std::vector<data::EncodedPair> RandomPairs(int64_t vocabulary) {
  at::manual_seed(11);
  const auto ids = [&](int64_t count) {
    const at::Tensor t = at::randint(0, vocabulary, {count}, at::kInt);
    return std::vector<int32_t>(t.data_ptr<int32_t>(), t.data_ptr<int32_t>() + count);
  };
  std::vector<data::EncodedPair> pairs;
  const std::vector<int32_t> shots = ids(9);
  for (int question = 0; question < 5; ++question) {
    std::vector<int32_t> context = question < 3 ? shots : std::vector<int32_t>{};
    const std::vector<int32_t> own = ids(3 + question);
    context.insert(context.end(), own.begin(), own.end());
    for (int choice = 0; choice < 4; ++choice) pairs.push_back({context, ids(1 + choice)});
  }
  pairs.push_back(pairs.front());  // the same request twice
  return pairs;
}

// Goal: sharing prefixes changes nothing, also with a sliding window (Mistral) and normalised heads (Qwen3).
// Oracle: the model's own pass over each whole sequence in float64 arithmetic of log_softmax.
TEST(ScorerTest, SharedPrefixesGiveTheScoresOfWholeSequences) {
  for (const char* name : {"llama", "mistral_window", "qwen2_yarn", "qwen3", "qwen2_mixed_window", "qwen3_mixed_window"}) {
    SCOPED_TRACE(name);
    const std::shared_ptr<const model::CausalLm> model = model::TinyModel(model::TinyVectors(name), at::kFloat);
    const std::vector<data::EncodedPair> pairs = RandomPairs(model->config().vocab_size);
    runtime::NullReporter reporter;
    Scorer scorer(model, nullptr, reporter, {.head_rows = 5, .limits = TreeLimits{.batch_tokens = 60, .min_shared = 3}});
    const auto scores = scorer.ScoreIds(pairs);
    ASSERT_THAT(scores, IsOk());
    EXPECT_LT(scorer.computed_tokens(), scorer.requested_tokens());
    for (size_t i = 0; i < pairs.size(); ++i) {
      std::vector<int64_t> tokens(pairs[i].context.begin(), pairs[i].context.end());
      tokens.insert(tokens.end(), pairs[i].continuation.begin(), pairs[i].continuation.end());
      const at::Tensor logits = model->Logits(model->Hidden(model::Pack({tokens}))).to(at::kDouble);
      double expected = 0;
      int64_t greedy = 0;
      for (size_t t = pairs[i].context.size(); t < tokens.size(); ++t) {
        const at::Tensor row = logits[static_cast<int64_t>(t) - 1];
        expected += row.log_softmax(0)[tokens[t]].item<double>();
        greedy += row.argmax().item<int64_t>() == tokens[t] ? 1 : 0;
      }
      EXPECT_NEAR((*scores)[i].log_likelihood, expected, 1e-4);
      EXPECT_EQ((*scores)[i].greedy_tokens, greedy);
      EXPECT_EQ((*scores)[i].tokens, static_cast<int64_t>(pairs[i].continuation.size()));
    }
  }
}

// Goal: the bfloat16 kernels give the same scores up to rounding, with shared prefixes, windows of each layer and normalised heads,
// in small batches and large ones.
// Oracle: a model with the same bfloat16 weights computing in float32, over each whole sequence.
TEST(ScorerTest, PairKernelsAgreeWithFloat32) {
  for (const char* name : {"qwen3", "qwen3_mixed_window", "qwen3_yarn_mscale"}) {
    SCOPED_TRACE(name);
    const nlohmann::json vectors = model::TinyVectors(name);
    const std::shared_ptr<const model::CausalLm> half = model::TinyModel(vectors, at::kBFloat16);
    if (!kernels::PairAttentionWorks(16)) GTEST_SKIP() << "this CPU has no AVX512_BF16";
    ASSERT_TRUE(PairTreePass::Works(*half));
    const model::TensorSource source = [weights = model::TinyWeights(vectors)](const std::string& tensor) -> StatusOr<at::Tensor> {
      RF_ASSIGN_OR_RETURN(const at::Tensor exact, weights(tensor));
      return exact.to(at::kBFloat16).to(at::kFloat);
    };
    const auto rounded = model::CausalLm::Load(model::TinyConfig(vectors), source, {.dtype = at::kFloat});
    ASSERT_THAT(rounded, IsOk());
    const std::vector<data::EncodedPair> pairs = RandomPairs(half->config().vocab_size);
    for (const TreeLimits& limits : {TreeLimits{}, TreeLimits{.batch_tokens = 2048, .block_tokens = 2048, .min_shared = 1},
                                     TreeLimits{.batch_tokens = 20, .block_tokens = 20, .min_shared = 1}}) {
      runtime::NullReporter reporter;
      Scorer scorer(half, nullptr, reporter, {.limits = limits});
      const auto scores = scorer.ScoreIds(pairs);
      ASSERT_THAT(scores, IsOk());
      for (size_t i = 0; i < pairs.size(); ++i) {
        std::vector<int64_t> tokens(pairs[i].context.begin(), pairs[i].context.end());
        tokens.insert(tokens.end(), pairs[i].continuation.begin(), pairs[i].continuation.end());
        const at::Tensor logits = (*rounded)->Logits((*rounded)->Hidden(model::Pack({tokens}))).to(at::kDouble);
        double expected = 0, range = 0;
        for (size_t t = pairs[i].context.size(); t < tokens.size(); ++t) {
          const at::Tensor row = logits[static_cast<int64_t>(t) - 1];
          expected += row.log_softmax(0)[tokens[t]].item<double>();
          range += (row.max() - row.min()).item<double>();
        }
        EXPECT_NEAR((*scores)[i].log_likelihood, expected, 0.01 * range) << "pair " << i;
        EXPECT_EQ((*scores)[i].tokens, static_cast<int64_t>(pairs[i].continuation.size()));
      }
    }
  }
}

// Inputs longer than the model lose their beginning, as in the harness; a continuation that cannot fit is an error.
TEST(ScorerTest, CutsLongInputsFromTheLeft) {
  const std::shared_ptr<const model::CausalLm> model = model::TinyModel(model::TinyVectors("llama"), at::kFloat);
  runtime::NullReporter reporter;
  Scorer scorer(model, nullptr, reporter, {.max_length = 6});
  const auto cut = scorer.ScoreIds({{{1, 2, 3, 4, 5, 6, 7}, {8, 9}}, {{3, 4, 5, 6, 7}, {8, 9}}});
  ASSERT_THAT(cut, IsOk());
  EXPECT_EQ((*cut)[0].log_likelihood, (*cut)[1].log_likelihood);
  EXPECT_THAT(scorer.ScoreIds({{{1}, {1, 2, 3, 4, 5, 6, 7}}}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("does not fit")));
  EXPECT_THAT(scorer.ScoreIds({{{1}, {1 << 20}}}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("vocabulary")));
}

// Oracle: exp, mean and the ratio estimator's standard error from the scorer's per-example values.
TEST(PerplexityTest, AnswersAreScoredPerToken) {
  const std::shared_ptr<const model::CausalLm> model = model::TinyModel(model::TinyVectors("llama"), at::kFloat);
  runtime::NullReporter reporter;
  Scorer scorer(model, nullptr, reporter);
  std::vector<data::EncodedExample> examples(2);
  examples[0] = {.tokens = {1, 2, 3, 4}, .answer_begin = 2};
  examples[1] = {.tokens = {5, 6, 7, 8}, .answer_begin = 3};
  const auto result = EvaluateAnswers(examples, scorer);
  ASSERT_THAT(result, IsOk());
  const auto alone = scorer.ScoreIds({{{1, 2}, {3, 4}}, {{5, 6, 7}, {8}}});
  ASSERT_THAT(alone, IsOk());
  EXPECT_EQ(result->tokens, 3);
  EXPECT_NEAR(result->loss, -((*alone)[0].log_likelihood + (*alone)[1].log_likelihood) / 3, 1e-6);
  EXPECT_NEAR(result->perplexity, std::exp(result->loss), 1e-9);
  const double a = -(*alone)[0].log_likelihood - 2 * result->loss, b = -(*alone)[1].log_likelihood - result->loss;
  EXPECT_NEAR(result->loss_standard_error, std::sqrt(2 * (a * a + b * b)) / 3, 1e-6);
}

// Goal: the divergence of a model from itself is 0 and from another model the mean of its rows.
// Method: a cache written from the tiny Llama's own logits, read back, against float64 sums.
TEST(KlTest, HeldOutDivergenceReadsTheCache) {
  const std::shared_ptr<const model::CausalLm> model = model::TinyModel(model::TinyVectors("llama"), at::kFloat);
  const std::shared_ptr<const model::CausalLm> other = model::TinyModel(model::TinyVectors("llama_linear"), at::kFloat);
  const std::vector<std::vector<int64_t>> texts = {{1, 2, 3, 4, 5}, {9, 8, 7}, {4, 4, 6, 1}};
  distill::LogitCacheWriter writer({.teacher_digest = "t", .tokenizer_digest = "k",
                                    .vocab_size = model->config().vocab_size, .top_k = 8});
  std::vector<data::EncodedExample> examples;
  std::vector<double> expected;
  for (const std::vector<int64_t>& text : texts) {
    data::EncodedExample example{.tokens = {text.begin(), text.end()}, .answer_begin = 2};
    example.key = data::TokenKey(example.tokens, example.answer_begin);
    const int64_t answer = static_cast<int64_t>(text.size()) - 2;
    const at::Tensor teacher = model->Logits(model->Hidden(model::Pack({text}))).narrow(0, 1, answer);
    writer.Add(example.key, teacher);
    const at::Tensor p = teacher.to(at::kDouble).softmax(1);
    const at::Tensor q = other->Logits(other->Hidden(model::Pack({text}))).narrow(0, 1, answer).to(at::kDouble).softmax(1);
    const auto [top, ids] = p.topk(8, 1);
    const at::Tensor q_top = q.gather(1, ids), tail_p = 1 - top.sum(1), tail_q = 1 - q_top.sum(1);
    const at::Tensor rows = (top * (top / q_top).log()).sum(1) + tail_p * (tail_p / tail_q).log();
    expected.push_back(rows.mean().item<double>());
    examples.push_back(std::move(example));
  }
  const std::filesystem::path folder = std::filesystem::path(::testing::TempDir()) / "eval_test_cache";
  ASSERT_THAT(writer.Write(folder), IsOk());
  const auto cache = distill::LogitCache::Open(folder);
  ASSERT_THAT(cache, IsOk());
  runtime::NullReporter reporter;
  const auto itself = KlToTeacher(*model, examples, **cache, reporter, {.batch_tokens = 8});
  ASSERT_THAT(itself, IsOk());
  EXPECT_NEAR(itself->mean, 0, 1e-5);
  EXPECT_EQ(itself->top1_agreement, 1);
  const auto apart = KlToTeacher(*other, examples, **cache, reporter, {.batch_tokens = 8, .head_rows = 2});
  ASSERT_THAT(apart, IsOk());
  for (size_t i = 0; i < expected.size(); ++i) EXPECT_NEAR(apart->per_example[i], expected[i], 1e-4);
  EXPECT_NEAR(apart->mean, (expected[0] + expected[1] + expected[2]) / 3, 1e-4);
  EXPECT_EQ(apart->tokens, 6);
  examples[0].key = "sha256:none";
  EXPECT_EQ(KlToTeacher(*model, examples, **cache, reporter).status().code(), absl::StatusCode::kNotFound);
}

// Oracle: the window rule of the harness, worked out by hand for 10 tokens and windows of 4.
TEST(PerplexityTest, WindowsFollowTheHarness) {
  const auto windows = RollingWindows({0, 1, 2, 3, 4, 5, 6, 7, 8, 9}, 99, 4);
  ASSERT_EQ(windows.size(), 3U);
  EXPECT_THAT(windows[0].context, ElementsAre(99));
  EXPECT_THAT(windows[0].continuation, ElementsAre(0, 1, 2, 3));
  EXPECT_THAT(windows[1].context, ElementsAre(3));
  EXPECT_THAT(windows[1].continuation, ElementsAre(4, 5, 6, 7));
  EXPECT_THAT(windows[2].context, ElementsAre(5, 6, 7));
  EXPECT_THAT(windows[2].continuation, ElementsAre(8, 9));
}

// Oracle: the pages, texts and counts of lm-evaluation-harness 0.4.13.
TEST(PerplexityTest, DetokenizesAndCountsAsTheHarnessDoes) {
  const std::filesystem::path shared = std::filesystem::path(REFINERY_SOURCE_DIR) / ".." / "shared" / "data";
  if (!std::filesystem::exists(shared / "gold")) GTEST_SKIP() << "no ../shared/data";
  const auto pages = data::ReadJsonLines(shared / "tasks" / "wikitext" / "test_100k.jsonl");
  const auto gold = data::ReadJsonLines(shared / "gold" / "wikitext.test_100k.max1024.jsonl");
  ASSERT_THAT(pages, IsOk());
  ASSERT_THAT(gold, IsOk());
  ASSERT_EQ(pages->size(), gold->size());
  for (size_t i = 0; i < pages->size(); ++i) {
    const std::string page = (*pages)[i]["page"].get<std::string>();
    EXPECT_EQ(DetokenizeWikiText(page), (*gold)[i]["text"].get<std::string>());
    EXPECT_EQ(CountWords(page), (*gold)[i]["words"].get<int64_t>());
    EXPECT_EQ(static_cast<int64_t>(page.size()), (*gold)[i]["bytes"].get<int64_t>());
  }
}

// Oracle: numpy std(ddof=1) / sqrt(n) for 0 1 1 0 1, and the harness' pooled_sample_stderr worked out by hand for two groups.
TEST(MultipleChoiceTest, StandardErrors) {
  const Accuracy plain = MeanAccuracy({false, true, true, false, true}, {});
  EXPECT_DOUBLE_EQ(plain.value, 0.6);
  EXPECT_NEAR(plain.standard_error, std::sqrt(0.3 / 5), 1e-12);
  const Accuracy pooled = MeanAccuracy({false, true, true, false, true}, {"a", "a", "b", "b", "b"});
  // Within-group squares: a 2 * 1/4 = 1/2, b 3 * 2/9 = 2/3; (1/2 + 2/3) / (5 - 2) / 5.
  EXPECT_NEAR(pooled.standard_error, std::sqrt((0.5 + 2.0 / 3) / 3 / 5), 1e-12);
  EXPECT_EQ(MeanAccuracy({true}, {}).standard_error, 0);
}

// Goal: shards score the same bits as one task does, and their merge gives the same figures, also through the items' JSON.
// Method: a tiny model and 300 items (three blocks) of different lengths, in one piece and as one of two shards each.
TEST(MultipleChoiceTest, MergedShardsEqualOneTask) {
  const std::shared_ptr<const model::CausalLm> model = model::TinyModel(model::TinyVectors("llama"), at::kBFloat16);
  runtime::NullReporter reporter;
  std::vector<data::MultipleChoiceItem> items;
  for (int i = 0; i < 300; ++i) {
    data::MultipleChoiceItem item;
    item.task = "piqa";
    item.bodies = {std::string(static_cast<size_t>(3 + i * 7 % 23), static_cast<char>('a' + i % 11))};
    item.choices = item.answers = {Join("x", i % 5), Join("y", i % 7, "z")};
    item.continuations = {" " + item.choices[0], " " + item.choices[1]};
    item.gold = i % 2;
    items.push_back(item);
  }
  const int64_t vocabulary = model->config().vocab_size;
  const auto ids = [&](const std::string& text) {
    std::vector<int32_t> result;
    for (const char c : text) result.push_back(static_cast<int32_t>(c % vocabulary));
    return result;
  };
  const auto run = [&](int64_t shard, int64_t shards) {
    Scorer scorer(model, nullptr, reporter);
    const auto score = [&](const std::vector<data::ScoreRequest>& requests) -> StatusOr<std::vector<data::Score>> {
      std::vector<data::EncodedPair> pairs;
      for (const data::ScoreRequest& request : requests) pairs.push_back({ids(request.context), ids(request.continuation)});
      RF_ASSIGN_OR_RETURN(const std::vector<TokenScore> found, scorer.ScoreIds(pairs));
      std::vector<data::Score> scores;
      for (const TokenScore& one : found) scores.push_back({one.log_likelihood, one.tokens, false});
      return scores;
    };
    const auto result = EvaluateMultipleChoice(items, score, {.shard = shard, .shards = shards});
    RF_CHECK(result.ok());
    return *result;
  };
  const MultipleChoiceResult whole = run(0, 1);
  std::vector<ItemResult> parts;
  for (int64_t shard = 0; shard < 2; ++shard) {
    const MultipleChoiceResult part = run(shard, 2);
    EXPECT_LT(part.count, whole.count);
    for (const ItemResult& item : part.items) {
      const auto read = ItemResultFromJson(nlohmann::json::parse(ToJson(item).dump()), "items");
      ASSERT_THAT(read, IsOk());
      parts.push_back(*read);
    }
  }
  const auto merged = Summarize("piqa", parts, /*acc_norm=*/true);
  ASSERT_THAT(merged, IsOk());
  ASSERT_EQ(merged->items.size(), 300U);
  for (size_t i = 0; i < 300; ++i) EXPECT_EQ(ToJson(merged->items[i]), ToJson(whole.items[i]));
  EXPECT_EQ(merged->acc.value, whole.acc.value);
  EXPECT_EQ(merged->acc_norm->standard_error, whole.acc_norm->standard_error);
  parts.push_back(parts.front());
  EXPECT_THAT(Summarize("piqa", parts, true), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("twice")));
}

// Goal: acc takes the first of equal choices, acc_norm divides by code points.  Method: a table instead of a model.
TEST(MultipleChoiceTest, TiesAndNormalisation) {
  data::MultipleChoiceItem item;
  item.task = "piqa";
  item.bodies = {"q"};
  item.choices = item.answers = {"ab", "\u00e9\u00e9\u00e9\u00e9"};
  item.continuations = {" ab", " \u00e9\u00e9\u00e9\u00e9"};
  item.gold = 0;
  const auto table = [](const std::vector<data::ScoreRequest>& requests) -> StatusOr<std::vector<data::Score>> {
    EXPECT_EQ(requests.size(), 2U);
    return std::vector<data::Score>{{-4.0, 1, false}, {-4.0, 2, false}};
  };
  const auto result = EvaluateMultipleChoice({item}, table);
  ASSERT_THAT(result, IsOk());
  EXPECT_EQ(result->items[0].prediction, 0);
  EXPECT_EQ(result->items[0].prediction_norm, 1);
  EXPECT_EQ(result->acc.value, 1);
  ASSERT_TRUE(result->acc_norm.has_value());
  EXPECT_EQ(result->acc_norm->value, 0);
  EXPECT_THAT(EvaluateMultipleChoice({}, table), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("no benchmark items")));
}

// Oracle: the definition in float64 with the tail as one class; the teacher compared with itself gives 0.
TEST(KlTest, RowsEqualTheDefinition) {
  at::manual_seed(5);
  const at::Tensor teacher_logits = at::randn({7, 50}, at::kDouble) * 3, student_logits = at::randn({7, 50}, at::kDouble) * 3;
  const at::Tensor p = teacher_logits.softmax(1), q = student_logits.softmax(1);
  const auto [top, ids] = p.topk(8, 1);
  const at::Tensor tail_p = 1 - top.sum(1);
  const distill::TeacherRows rows{ids.to(at::kInt), top.log().to(at::kFloat), tail_p.log().to(at::kFloat)};
  const at::Tensor q_top = q.gather(1, ids), tail_q = 1 - q_top.sum(1);
  const at::Tensor expected = (top * (top / q_top).log()).sum(1) + tail_p * (tail_p / tail_q).log();
  EXPECT_LT((KlRows(student_logits.to(at::kFloat), rows) - expected).abs().max().item<double>(), 1e-5);
  EXPECT_LT(KlRows(teacher_logits.to(at::kFloat), rows).abs().max().item<double>(), 1e-6);
}

// All the mass in the entries: the tail is -inf in the cache and must not turn the sum into NaN.
TEST(KlTest, AnEmptyTailCountsNothing) {
  const at::Tensor logits = at::tensor({1.0F, 2.0F, 3.0F}).unsqueeze(0);
  const at::Tensor ids = at::tensor({0, 1, 2}, at::kInt).unsqueeze(0);
  const distill::TeacherRows rows{ids, logits.log_softmax(1), at::full({1}, -std::numeric_limits<float>::infinity())};
  EXPECT_NEAR(KlRows(logits, rows).item<double>(), 0, 1e-6);
}

}  // namespace
}  // namespace refinery::eval
