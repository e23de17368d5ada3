// Prompts, token ids and statistics against lm-evaluation-harness 0.4.13's own code: the vectors of tests/vectors/eval (see
// make_vectors.py there). Prompts need the pulled benchmarks (~/.cache/refinery/data, or REFINERY_DATA_DIR) and, like the token
// ids, the tokenizer of the imported SmolLM2; what is not there is skipped.
#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <iostream>
#include <set>

#include "common/digest.h"
#include "common/files.h"
#include "common/temporary_folder.h"
#include "tests/support/status_matchers.h"
#include "worker/task/checkpoint/import.h"
#include "worker/task/data/random.h"
#include "worker/task/eval/figures.h"
#include "worker/task/eval/harness.h"
#include "worker/task/eval/requests.h"
#include "worker/task/eval/task_set.h"

namespace refinery::eval {
namespace {

using nlohmann::json;
using ::refinery::testing::IsOk;
using ::refinery::testing::StatusIs;
using ::testing::HasSubstr;

json Vectors(const std::string& name) {
  return json::parse(std::ifstream(std::filesystem::path(REFINERY_SOURCE_DIR) / "tests/vectors/eval" / (name + ".json")));
}

std::filesystem::path Home() {
  const char* home = std::getenv("HOME");
  return home == nullptr ? "/" : home;
}

std::filesystem::path DataFolder() {
  const char* named = std::getenv("REFINERY_DATA_DIR");
  return named != nullptr ? std::filesystem::path(named) : Home() / ".cache/refinery/data";
}

// The folder of the imported model, or an empty path.
std::filesystem::path ModelFolderPath() {
  const char* named = std::getenv("REFINERY_TEST_MODEL");
  const std::filesystem::path file =
      named != nullptr ? std::filesystem::path(named) : Home() / ".cache/refinery/models/SmolLM2-135M-Instruct.Q4_1.gguf";
  if (!std::filesystem::exists(file)) return {};
  const std::filesystem::path cache = std::filesystem::path(REFINERY_BINARY_DIR) / "test_cache";
  const auto ref = checkpoint::ImportModel(file.string(), cache);
  RF_CHECK(ref.ok());
  return checkpoint::ResolveModel(*ref, cache).value();
}

// The model's tokenizer with another chat template, or with a post-processor that adds a BOS.
std::shared_ptr<const tokenizer::Tokenizer> Changed(const std::filesystem::path& model, const std::string& chat_template,
                                                    const std::string& bos) {
  const auto folder = TemporaryFolder::Make("refinery-harness");
  RF_CHECK(folder.ok());
  const std::filesystem::path copy = folder->path();
  std::filesystem::copy_file(model / "config.json", copy / "config.json");
  json config = json::parse(std::ifstream(model / "tokenizer_config.json"));
  if (!chat_template.empty()) config["chat_template"] = chat_template;
  json spec = json::parse(std::ifstream(model / "tokenizer.json"));
  if (!bos.empty()) {
    config["bos_token"] = bos;
    config["add_bos_token"] = true;
    int64_t id = -1;
    for (const json& token : spec["added_tokens"]) {
      if (token["content"] == bos) id = token["id"];
    }
    const auto part = [](const char* kind, const std::string& name, int type) {
      return json{{kind, {{"id", name}, {"type_id", type}}}};
    };
    spec["post_processor"] = {{"type", "TemplateProcessing"},
                              {"single", json::array({part("SpecialToken", bos, 0), part("Sequence", "A", 0)})},
                              {"pair", json::array({part("Sequence", "A", 0), part("Sequence", "B", 1)})},
                              {"special_tokens", {{bos, {{"id", bos}, {"ids", {id}}, {"tokens", {bos}}}}}}};
  }
  RF_CHECK(WriteFileAtomically(copy / "tokenizer.json", spec.dump()).ok());
  RF_CHECK(WriteFileAtomically(copy / "tokenizer_config.json", config.dump()).ok());
  auto loaded = tokenizer::Tokenizer::Load(copy);
  RF_CHECK(loaded.ok());
  return *loaded;
}

// Goal: the strings that are scored are those of the harness' own task code, for 1,000 random items of each benchmark.
// Method: the same rows by the same random numbers; a digest over every hundred items.
TEST(HarnessPromptsTest, StringsEqualTheHarness) {
  const json vectors = Vectors("prompts");
  const std::filesystem::path model = ModelFolderPath();
  std::map<std::string, std::shared_ptr<const tokenizer::Tokenizer>> templates;
  if (!model.empty()) {
    templates["chat"] = templates["chat_single_turn"] = Changed(model, "", "");
    templates["chat_refusing"] = Changed(model, vectors["refusing_template"], "");
  }
  std::set<std::string> skipped;
  size_t compared = 0;
  for (const json& one : vectors["prompts"]) {
    const std::string name = one["benchmark"], split = one["split"], mode = one["mode"];
    const size_t shots = one["shots"], rows = one["rows"], count = one["items"], per_digest = vectors["per_digest"];
    SCOPED_TRACE(Join(name, " ", mode, " ", shots, "-shot"));
    const std::filesystem::path folder = DataFolder() / name;
    const std::filesystem::path pool_file = folder / (name == "mmlu" ? "dev.jsonl" : "train.jsonl");
    if (!std::filesystem::exists(folder / (split + ".jsonl")) || (shots > 0 && !std::filesystem::exists(pool_file)) ||
        (mode != "plain" && model.empty())) {
      skipped.insert(Join(name, " ", mode));
      continue;
    }
    const auto all = data::ReadItems(name, folder / (split + ".jsonl"));
    ASSERT_THAT(all, IsOk());
    ASSERT_EQ(all->size(), rows);
    std::vector<size_t> chosen = data::PythonRandom(vectors["seed"].get<uint32_t>()).Sample(rows, count);
    std::sort(chosen.begin(), chosen.end());
    std::vector<data::MultipleChoiceItem> items;
    for (const size_t index : chosen) items.push_back((*all)[index]);
    if (shots > 0) {
      const auto pool = data::ReadItems(name, pool_file);
      ASSERT_THAT(pool, IsOk());
      auto prompted = data::WithHarnessShots(items, *pool, shots);
      ASSERT_THAT(prompted, IsOk());
      items = *std::move(prompted);
    }
    PromptOptions options{.multi_turn = mode != "chat_single_turn"};
    if (mode != "plain") options.chat_template = templates.at(mode).get();
    ASSERT_EQ(one["digests"].size(), (items.size() + per_digest - 1) / per_digest);
    for (size_t part = 0; part < one["digests"].size(); ++part) {
      std::vector<data::ScoreRequest> requests;
      for (size_t i = part * per_digest; i < std::min(items.size(), (part + 1) * per_digest); ++i, ++compared) {
        const auto own = RequestsOf(items[i], options);
        ASSERT_THAT(own, IsOk());
        requests.insert(requests.end(), own->begin(), own->end());
      }
      EXPECT_EQ(ContextDigest(requests), one["digests"][part].get<std::string>()) << "items from " << part * per_digest;
    }
  }
  std::cout << compared << " items compared\n";
  for (const std::string& one : skipped) std::cout << "not compared: " << one << " (`refinery data pull` brings the data)\n";
  if (compared == 0) GTEST_SKIP() << "no benchmarks in " << DataFolder();
}

// Goal: token ids by the BOS rules of two releases, with a tokenizer that adds a BOS and one that does not.
TEST(HarnessTokensTest, BosFollowsTheRelease) {
  const std::filesystem::path model = ModelFolderPath();
  if (model.empty()) GTEST_SKIP() << "no model; set REFINERY_TEST_MODEL";
  const json vectors = Vectors("encodings");
  for (const json& one : vectors["encodings"]) {
    const auto harness = HarnessOf(one["version"]);
    ASSERT_THAT(harness, IsOk());
    const auto tokenizer = Changed(model, "", one["adds_bos"].get<bool>() ? vectors["bos"].get<std::string>() : "");
    for (const json& pair : one["pairs"]) {
      SCOPED_TRACE(Join(harness->version, one["adds_bos"].get<bool>() ? " adds BOS: " : ": ", pair["context"].dump(), " ",
                        pair["continuation"].dump()));
      const auto ids = data::EncodePair(pair["context"].get<std::string>(), pair["continuation"].get<std::string>(), *tokenizer,
                                        harness->special_tokens);
      ASSERT_THAT(ids, IsOk());
      EXPECT_EQ(ids->context, pair["context_ids"].get<std::vector<int32_t>>());
      EXPECT_EQ(ids->continuation, pair["continuation_ids"].get<std::vector<int32_t>>());
    }
  }
}

TEST(HarnessTokensTest, ReleasesAreOrderedByTheirNumbers) {
  EXPECT_FALSE(HarnessOf("0.4.9.1")->special_tokens);
  EXPECT_FALSE(HarnessOf("0.4.2")->special_tokens);
  EXPECT_TRUE(HarnessOf("0.4.9.2")->special_tokens);
  EXPECT_TRUE(HarnessOf("v0.4.10")->special_tokens);
  for (const char* wrong : {"", "0.3.0", "1.0.0", "0.4", "0.4.x", "main"}) {
    EXPECT_THAT(HarnessOf(wrong), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("0.4.13"))) << wrong;
  }
}

// Goal: MMLU's groups and subjects with their standard errors.  Method: answers by a rule that the vectors' script follows too.
TEST(HarnessFiguresTest, MmluGroupsEqualTheHarness) {
  const json vectors = Vectors("figures");
  std::vector<ItemResult> items;
  for (size_t subject = 0; subject < vectors["subjects"].size(); ++subject) {
    for (int64_t i = 0; i < vectors["subjects"][subject]["count"].get<int64_t>(); ++i) {
      const int64_t number = static_cast<int64_t>(subject);
      const bool right = (i * 37 + number * 11) % 101 < 40 + number % 7;
      items.push_back({.row = static_cast<int64_t>(items.size()), .subject = vectors["subjects"][subject]["subject"],
                       .gold = 1, .prediction = right ? 1 : 0, .prediction_norm = 0});
    }
  }
  const auto result = Summarize("mmlu", items, /*acc_norm=*/false);
  ASSERT_THAT(result, IsOk());
  std::map<std::string, Figure> figures;
  for (const Figure& figure : FiguresOf("mmlu", *result)) figures[figure.task] = figure;
  EXPECT_EQ(figures.size(), 62U);
  for (const json& subject : vectors["subjects"]) {
    const Figure& figure = figures.at("mmlu_" + subject["subject"].get<std::string>());
    EXPECT_NEAR(figure.value, subject["acc"].get<double>(), 1e-12);
    EXPECT_NEAR(*figure.standard_error, subject["acc_stderr"].get<double>(), 1e-12);
  }
  for (const auto& [name, group] : vectors["groups"].items()) {
    SCOPED_TRACE(name);
    EXPECT_NEAR(figures.at(name).value, group["acc"].get<double>(), 1e-12);
    EXPECT_NEAR(*figures.at(name).standard_error, group["acc_stderr"].get<double>(), 1e-12);
    EXPECT_EQ(figures.at(name).count, group["count"].get<int64_t>());
  }
}

// Goal: the bootstrap draws the harness' own resamples, so that its error is the same number.
TEST(HarnessFiguresTest, BootstrapEqualsTheHarness) {
  const json bootstrap = Vectors("figures")["bootstrap"];
  const auto perplexity = [](const std::vector<double>& values) { return std::exp(-MeanOf(values).mean); };
  const std::vector<double> values = bootstrap["values"];
  EXPECT_NEAR(perplexity(values) / bootstrap["perplexity"].get<double>(), 1, 1e-12);
  EXPECT_NEAR(HarnessBootstrapError(values, bootstrap["iterations"], perplexity) / bootstrap["stderr"].get<double>(), 1, 1e-9);
}

// Oracle: scipy.stats.binomtest(a, a + b, 0.5).
TEST(ComparisonTest, McNemarEqualsTheBinomialTest) {
  for (const json& one : Vectors("figures")["mcnemar"]) {
    EXPECT_NEAR(McNemarExact(one[0], one[1]) / one[2].get<double>(), 1, 1e-9) << one;
  }
}

// Goal: the interval of a paired difference has the width that the normal approximation gives, and covers the difference.
// Method: 2,000 items, 300 right for a alone and 200 for b alone: mean 0.05, sd sqrt(0.25 - 0.0025), so 1.96 * 0.01113.
TEST(ComparisonTest, IntervalOfThePairedDifference) {
  std::vector<double> a(2000, 1), b(2000, 1);
  for (size_t i = 0; i < 300; ++i) b[i] = 0;
  for (size_t i = 300; i < 500; ++i) a[i] = 0;
  const PairedDifference paired = ComparePaired(a, b);
  EXPECT_EQ(paired.only_a, 300);
  EXPECT_EQ(paired.only_b, 200);
  EXPECT_DOUBLE_EQ(paired.difference, 0.05);
  const double half = 1.959964 * std::sqrt((0.25 - 0.0025) / 2000);
  EXPECT_NEAR(paired.low, 0.05 - half, 0.1 * half);
  EXPECT_NEAR(paired.high, 0.05 + half, 0.1 * half);
  EXPECT_EQ(ComparePaired(a, a).p_value, 1);
}

TEST(ComparisonTest, DifferentItemsAreRefused) {
  EXPECT_THAT(Compare({{.task = "piqa", .metric = "acc", .scores = {1, 0}}}, {{.task = "piqa", .metric = "acc", .scores = {1}}}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("piqa")));
}

// Unknown names list the known ones; data that is missing names the command that brings it.
TEST(TaskSetTest, SaysWhatIsWrong) {
  EXPECT_THAT(LoadTaskItems("mmlu_alchemy", {.data = "/nowhere"}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("mmlu_stem")));
  EXPECT_THAT(LoadTaskItems("piqa", {.data = "/nowhere"}),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("refinery data pull piqa")));
  EXPECT_TRUE(IsKnownTask("social_iqa"));
  EXPECT_FALSE(IsKnownTask("alchemy"));
}

// Goal: an item among its own shots is left out, and copies of it never stand in for other shots.
// Method: a pool of three rows, two of them the item itself: the only other one must be the shot.
TEST(FewShotTest, CopiesOfTheItemAreDrawnAgain) {
  const auto item = [](const char* goal) {
    return *data::ItemFromRow("piqa", {{"goal", goal}, {"sol1", "x"}, {"sol2", "y"}, {"label", 0}}, "test");
  };
  const std::vector<data::MultipleChoiceItem> pool = {item("same"), item("same"), item("other")};
  const std::vector<data::MultipleChoiceItem> items(20, item("same"));
  const auto prompted = data::WithHarnessShots(items, pool, 1);
  ASSERT_THAT(prompted, IsOk());
  for (const data::MultipleChoiceItem& one : *prompted) EXPECT_THAT(one.shots, HasSubstr("other"));
}

}  // namespace
}  // namespace refinery::eval
