// SmolLM2-135M-Instruct in float32 against what lm-evaluation-harness 0.4.13 found on the same items (../shared/data/gold).
// Tolerance per choice: 2e-4 nats and 2e-5 per token, because PyTorch's float32 log_softmax, which the harness sums, is too high
// by about 9e-6 per token; bf16 would miss by a thousand times as much.
//
// REFINERY_GOLD_ITEMS=N changes the items per task (default 30 for arc_easy and piqa, 0 = all items of all tasks).
#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <cctype>
#include <chrono>
#include <cstdlib>
#include <fstream>
#include <iostream>

#include "tests/support/status_matchers.h"
#include "worker/task/checkpoint/import.h"
#include "worker/task/eval/multiple_choice.h"
#include "worker/task/eval/perplexity.h"
#include "worker/task/eval/scorer.h"

namespace refinery::eval {
namespace {

using nlohmann::json;
using ::refinery::testing::IsOk;

std::filesystem::path SharedData() { return std::filesystem::path(REFINERY_SOURCE_DIR) / ".." / "shared" / "data"; }

std::filesystem::path ModelFile() {
  if (const char* named = std::getenv("REFINERY_TEST_MODEL")) return named;
  const char* home = std::getenv("HOME");
  return std::filesystem::path(home == nullptr ? "/" : home) / ".cache/refinery/models/SmolLM2-135M-Instruct.Q4_1.gguf";
}

struct Loaded {
  std::shared_ptr<const model::CausalLm> model;
  std::shared_ptr<const tokenizer::Tokenizer> tokenizer;
};

class GoldTest : public ::testing::Test {
 protected:
  void SetUp() override {
    if (!std::filesystem::exists(SharedData() / "gold")) GTEST_SKIP() << "no ../shared/data";
    if (!std::filesystem::exists(ModelFile())) GTEST_SKIP() << "no model at " << ModelFile() << "; set REFINERY_TEST_MODEL";
  }

  static Loaded Load(at::ScalarType dtype) {
    const std::filesystem::path cache = std::filesystem::path(REFINERY_BINARY_DIR) / "test_cache";
    const auto ref = checkpoint::ImportModel(ModelFile().string(), cache);
    RF_CHECK(ref.ok());
    const auto folder = checkpoint::ResolveModel(*ref, cache);
    RF_CHECK(folder.ok());
    const auto weights = checkpoint::ModelFolder::Open(*folder);
    RF_CHECK(weights.ok());
    auto model = model::CausalLm::Load(**weights, {.dtype = dtype});
    RF_CHECK(model.ok());
    auto tokenizer = tokenizer::Tokenizer::Load(*folder);
    RF_CHECK(tokenizer.ok());
    return {*model, *tokenizer};
  }

  // Shared by the float32 tests: loading costs seconds.
  static const Loaded& Float32() {
    static const Loaded& loaded = *new Loaded(Load(at::kFloat));
    return loaded;
  }
};

struct GoldCase {
  std::string task, subset;
  size_t shots;
};

size_t Limit(size_t otherwise) {
  const char* items = std::getenv("REFINERY_GOLD_ITEMS");
  return items == nullptr ? otherwise : static_cast<size_t>(std::atoi(items));
}

std::vector<data::MultipleChoiceItem> Items(const GoldCase& gold, size_t limit) {
  const std::filesystem::path folder = SharedData() / "tasks" / gold.task;
  auto items = data::ReadItems(gold.task, folder / (gold.subset + ".jsonl"), limit);
  const auto pool = data::ReadItems(gold.task, folder / "fewshot.jsonl");
  RF_CHECK(items.ok() && pool.ok());
  auto prompted = data::WithHarnessShots(*items, *pool, gold.shots);
  RF_CHECK(prompted.ok());
  return *std::move(prompted);
}

// Texts on which two right tokenizers differ: SmolLM2's own splits digits off before anything else (so white space before a
// digit stays together, and a fraction sign stands alone); the GGUF conversion of transformers, which the gold was made with,
// does not.
bool SplitsAtNumbers(const std::string& text) {
  for (size_t i = 2; i < text.size(); ++i) {
    if (std::isdigit(static_cast<unsigned char>(text[i])) != 0 && std::isspace(static_cast<unsigned char>(text[i - 1])) != 0 &&
        std::isspace(static_cast<unsigned char>(text[i - 2])) != 0) {
      return true;
    }
  }
  for (const char* sign : {"\u00bc", "\u00bd", "\u00be", "\u00b2", "\u00b3", "\u2153"}) {
    if (text.find(sign) != std::string::npos) return true;
  }
  return false;
}

// The gold's own ids; counts (and allows, where the text explains it) ids that our tokenizer makes differently.
std::vector<data::EncodedPair> GoldPairs(const std::vector<json>& rows, const tokenizer::Tokenizer& tokenizer, int* different) {
  std::vector<data::EncodedPair> pairs;
  for (size_t i = 0; i < rows.size(); ++i) {
    for (const json& request : rows[i]["requests"]) {
      const std::string context = request["context"], continuation = request["continuation"];
      pairs.push_back({request["ctx_ids"].get<std::vector<int32_t>>(), request["cont_ids"].get<std::vector<int32_t>>()});
      const auto ours = data::EncodePair(context, continuation, tokenizer);
      EXPECT_THAT(ours, IsOk());
      if (!ours.ok() || (ours->context == pairs.back().context && ours->continuation == pairs.back().continuation)) continue;
      EXPECT_TRUE(SplitsAtNumbers(context + continuation)) << "row " << i << ": " << context << continuation;
      ++*different;
    }
  }
  return pairs;
}

void ExpectGold(const Loaded& loaded, const GoldCase& gold, size_t limit) {
  const std::vector<data::MultipleChoiceItem> items = Items(gold, limit);
  const auto rows = data::ReadJsonLines(
      SharedData() / "gold" / Join(gold.task, ".", gold.subset, ".", gold.shots, "shot.jsonl"), limit);
  ASSERT_THAT(rows, IsOk());
  ASSERT_EQ(rows->size(), items.size());
  int different = 0;
  const std::vector<data::EncodedPair> pairs = GoldPairs(*rows, *loaded.tokenizer, &different);
  runtime::NullReporter reporter;
  Scorer scorer(loaded.model, loaded.tokenizer, reporter);
  const auto scores = scorer.ScoreIds(pairs);
  ASSERT_THAT(scores, IsOk());
  const auto result = EvaluateMultipleChoice(items, [&](const auto&) -> StatusOr<std::vector<data::Score>> {
    std::vector<data::Score> table;
    for (const TokenScore& score : *scores) {
      table.push_back({score.log_likelihood, score.tokens, score.greedy_tokens == score.tokens});
    }
    return table;
  });
  ASSERT_THAT(result, IsOk());
  double worst = 0;
  for (size_t i = 0, next = 0; i < items.size(); ++i) {
    const json& row = (*rows)[i];
    SCOPED_TRACE(Join(gold.task, " row ", i));
    EXPECT_EQ(result->items[i].prediction, row["pred"].get<int64_t>());
    if (row["acc_norm"].is_number()) {
      EXPECT_EQ(result->items[i].prediction_norm, row["pred_norm"].get<int64_t>());
    }
    for (const json& request : row["requests"]) {
      const TokenScore& score = (*scores)[next++];
      const double difference = std::abs(score.log_likelihood - request["ll"].get<double>());
      EXPECT_LT(difference, 2e-4 + 2e-5 * static_cast<double>(score.tokens));
      EXPECT_EQ(score.greedy_tokens == score.tokens, request["is_greedy"].get<bool>());
      worst = std::max(worst, difference);
    }
  }
  std::cout << gold.task << " " << gold.shots << "-shot: " << items.size() << " items, acc " << result->acc.value << ", acc_norm "
            << (result->acc_norm ? result->acc_norm->value : NAN) << ", largest difference " << worst << " nats, "
            << scorer.computed_tokens() << " tokens computed for " << scorer.requested_tokens() << ", " << different
            << " requests tokenised differently\n";
}

TEST_F(GoldTest, Float32LikelihoodsEqualTheHarness) {
  const size_t limit = Limit(30);
  std::vector<GoldCase> cases = {{"arc_easy", "dev", 0}, {"piqa", "dev", 0}};
  if (std::getenv("REFINERY_GOLD_ITEMS") != nullptr) {
    cases = {{"arc_easy", "dev", 0},    {"piqa", "dev", 0},           {"commonsense_qa", "dev", 0}, {"hellaswag", "dev", 0},
             {"mmlu", "dev", 0},        {"openbookqa", "dev", 0},     {"social_i_qa", "dev", 0},    {"winogrande", "dev", 0},
             {"arc_easy", "dev30", 5},  {"hellaswag", "dev30", 5},    {"mmlu", "dev30", 5},         {"winogrande", "dev30", 5}};
  }
  for (const GoldCase& gold : cases) ExpectGold(Float32(), gold, limit);
}

// Goal: the harness' totals with their standard errors (mmlu pools its subjects), from its own likelihoods.
// Method: a score function that reads the gold file; no model, all items of all tasks.
TEST(GoldTotalsTest, AccuraciesAndStandardErrorsEqualTheHarness) {
  if (!std::filesystem::exists(SharedData() / "gold")) GTEST_SKIP() << "no ../shared/data";
  std::ifstream stream(SharedData() / "gold" / "summary.json");
  const json summary = json::parse(stream);
  size_t compared = 0;
  for (const json& run : summary["runs"]) {
    const std::string task = run.value("task", "");
    if (!run.contains("acc") || !run["acc"].is_number()) continue;
    const GoldCase gold{task, run["subset"].get<std::string>(), run["num_fewshot"].get<size_t>()};
    const auto rows = data::ReadJsonLines(
        SharedData() / "gold" / Join(gold.task, ".", gold.subset, ".", gold.shots, "shot.jsonl"));
    ASSERT_THAT(rows, IsOk());
    std::vector<data::Score> table;
    for (const json& row : *rows) {
      for (const json& request : row["requests"]) {
        table.push_back({request["ll"].get<double>(), static_cast<int64_t>(request["cont_ids"].size()), false});
      }
    }
    const auto result = EvaluateMultipleChoice(Items(gold, 0), [&](const auto&) -> StatusOr<std::vector<data::Score>> {
      return table;
    });
    ASSERT_THAT(result, IsOk());
    SCOPED_TRACE(task);
    EXPECT_NEAR(result->acc.value, run["acc"].get<double>(), 1e-9);
    if (run["acc_stderr"].is_number()) {  // undefined for mmlu with one item per subject
      EXPECT_NEAR(result->acc.standard_error, run["acc_stderr"].get<double>(), 1e-9);
    }
    EXPECT_EQ(result->acc_norm.has_value(), run.contains("acc_norm") && run["acc_norm"].is_number());
    if (result->acc_norm) {
      EXPECT_NEAR(result->acc_norm->value, run["acc_norm"].get<double>(), 1e-9);
      EXPECT_NEAR(result->acc_norm->standard_error, run["acc_norm_stderr"].get<double>(), 1e-9);
    }
    ++compared;
  }
  EXPECT_GE(compared, 8U);
}

// The shortest page only: float32 runs at a few thousand tokens a second.
TEST_F(GoldTest, WikiTextPageEqualsTheHarness) {
  const auto pages = data::ReadJsonLines(SharedData() / "tasks" / "wikitext" / "test_100k.jsonl");
  const auto gold = data::ReadJsonLines(SharedData() / "gold" / "wikitext.test_100k.max1024.jsonl");
  ASSERT_THAT(pages, IsOk());
  ASSERT_THAT(gold, IsOk());
  size_t page = 0;
  for (size_t i = 0; i < gold->size(); ++i) {
    if ((*gold)[i]["bytes"] < (*gold)[page]["bytes"]) page = i;
  }
  runtime::NullReporter reporter;
  Scorer scorer(Float32().model, Float32().tokenizer, reporter);
  const auto result =
      EvaluateText({(*pages)[page]["page"].get<std::string>()}, *Float32().tokenizer, {.window = 1024}, 8192, scorer);
  ASSERT_THAT(result, IsOk());
  const double expected = (*gold)[page]["ll"].get<double>();
  EXPECT_NEAR(result->log_likelihood, expected, 2e-5 * static_cast<double>(result->tokens) + 2e-4);
  std::cout << "page " << page << ": " << result->tokens << " tokens, word perplexity " << result->word_perplexity << "\n";
}

// bf16 is what jobs run in: its likelihoods may differ by a little, and flip few items.
TEST_F(GoldTest, Bfloat16StaysNearTheHarness) {
  const GoldCase gold{"arc_easy", "dev", 0};
  const Loaded loaded = Load(at::kBFloat16);
  const std::vector<data::MultipleChoiceItem> items = Items(gold, 0);
  const auto rows = data::ReadJsonLines(SharedData() / "gold" / "arc_easy.dev.0shot.jsonl");
  ASSERT_THAT(rows, IsOk());
  runtime::NullReporter reporter;
  Scorer scorer(loaded.model, loaded.tokenizer, reporter);
  const auto start = std::chrono::steady_clock::now();
  const auto result = EvaluateMultipleChoice(items, scorer.AsScoreFn());
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  ASSERT_THAT(result, IsOk());
  double sum = 0, count = 0;
  int flips = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    flips += result->items[i].prediction != (*rows)[i]["pred"].get<int64_t>() ? 1 : 0;
    for (size_t c = 0; c < items[i].continuations.size(); ++c, ++count) {
      sum += std::abs(result->items[i].log_likelihoods[c] - (*rows)[i]["requests"][c]["ll"].get<double>());
    }
  }
  EXPECT_LT(sum / count, 0.3);
  EXPECT_LE(flips, 6);
  std::cout << "bf16: " << items.size() << " items in " << seconds.count() << " s, acc " << result->acc.value << ", mean difference "
            << sum / count << " nats, " << flips << " flips\n";
}

}  // namespace
}  // namespace refinery::eval
