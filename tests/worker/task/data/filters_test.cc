// The way from raw examples to splits: each check against closed forms or exact counts, and the ledger that misses nothing.
#include "worker/task/data/filters.h"

#include <cmath>
#include <set>

#include "tests/support/status_matchers.h"
#include "worker/task/data/contamination.h"
#include "worker/task/data/encoded.h"
#include "worker/task/data/minhash.h"
#include "worker/task/data/random.h"
#include "worker/task/data/rouge.h"
#include "worker/task/data/text.h"

namespace refinery::data {
namespace {

using ::refinery::testing::IsOk;
using ::refinery::testing::StatusIs;
using ::testing::HasSubstr;

TaskFormat Arc() {
  const auto format = FormatOf("arc_easy");
  RF_CHECK(format.ok());
  return *format;
}

Example Make(const std::string& question, const std::string& answer) {
  Example example;
  example.instruction = Join("Question: ", question, "\nAnswer:");
  example.output = answer;
  example.origin = "teacher";
  return example;
}

// Distinct made-up words, so that no two examples come near each other.
std::string Gibberish(SeededRandom& random, size_t words) {
  std::string text;
  for (size_t i = 0; i < words; ++i) {
    text += i == 0 ? "" : " ";
    for (int c = 0; c < 7; ++c) text += static_cast<char>('a' + random.Below(26));
  }
  return text;
}

// Oracle: by hand. LCS of "the cat sat" and "the dog sat on" is 2: F = 2 * 2 / (3 + 4).
TEST(RougeTest, IsTheHarmonicMeanOverTheLongestCommonSubsequence) {
  EXPECT_DOUBLE_EQ(RougeL(Words("The cat sat!"), Words("the dog sat on")), 4.0 / 7);
  EXPECT_DOUBLE_EQ(RougeL(Words("a b c"), Words("a b c")), 1);
  EXPECT_EQ(RougeL(Words("a"), {}), 0);
  EXPECT_GE(RougeLBound(3, 4), 4.0 / 7);
}

// Oracle: the exact Jaccard similarity of the sets of 5-grams; the estimate's standard error is at most 0.045.
TEST(MinHashTest, EstimatesJaccardSimilarity) {
  SeededRandom random(4);
  double squares = 0;
  for (int round = 0; round < 40; ++round) {
    const std::string shared = Gibberish(random, 6);
    const std::string a = Join(shared, " ", Gibberish(random, static_cast<size_t>(round % 6))),
                      b = Join(shared, " ", Gibberish(random, static_cast<size_t>(round % 4)));
    const auto grams = [](const std::string& text) {
      const std::string normalized = Normalized(text);
      std::set<std::string> set;
      for (size_t i = 0; i + 5 <= normalized.size(); ++i) set.insert(normalized.substr(i, 5));
      return set;
    };
    const std::set<std::string> ga = grams(a), gb = grams(b);
    size_t both = 0;
    for (const std::string& gram : ga) both += gb.count(gram);
    const double exact = static_cast<double>(both) / static_cast<double>(ga.size() + gb.size() - both);
    const double error = Similarity(MinHash(a), MinHash(b)) - exact;
    EXPECT_LT(std::abs(error), 0.18);
    squares += error * error;
  }
  EXPECT_LT(std::sqrt(squares / 40), 0.05);
}

// Goal: banding finds what a comparison of all pairs finds, at thresholds from loose to strict.
TEST(MinHashTest, BandsMissNoDuplicate) {
  for (const double threshold : {0.3, 0.5, 0.7, 0.9}) {
    SeededRandom random(9);
    MinHashIndex index(threshold);
    std::vector<MinHashSignature> all;
    int missed = 0, found = 0;
    for (size_t i = 0; i < 300; ++i) {
      const std::string base = Gibberish(random, 2);
      const MinHashSignature signature =
          i % 3 == 0 || all.empty() ? MinHash(Join(base, " ", Gibberish(random, 6)))
                                    : MinHash(Join("common words of a shared stem ", base.substr(0, random.Below(base.size()))));
      double best = 0;
      for (const MinHashSignature& other : all) best = std::max(best, Similarity(signature, other));
      const auto duplicate = index.FindDuplicate(signature);
      if (duplicate) {
        EXPECT_DOUBLE_EQ(duplicate->second, best);
      }
      found += duplicate ? 1 : 0;
      missed += !duplicate && best >= threshold ? 1 : 0;
      index.Add(i, signature);
      all.push_back(signature);
    }
    EXPECT_GT(found, 20) << threshold;
    EXPECT_LE(missed, 1) << threshold;
  }
}

MultipleChoiceItem Item(const std::string& question, const std::string& answer) {
  const auto item = ItemFromRow(
      "arc_easy", {{"question", question}, {"choices", {{"text", {answer, "none"}}, {"label", {"A", "B"}}}}, {"answerKey", "A"}}, "row");
  RF_CHECK(item.ok());
  return *item;
}

TEST(ContaminationTest, FindsCopiesAndLargeParts) {
  ContaminationIndex index;
  index.Add(Item("Which gas do plants take from the air?", "carbon dioxide"));  // 10 words with its answer: 5-grams, 60 %
  index.Add(Item("one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
                 "eighteen nineteen twenty", "x"));
  index.Add(Item("Why?", "so"));
  EXPECT_EQ(index.Find("WHICH gas do plants take, from the air", "oxygen")->what, "exact");
  const auto part = index.Find("Tell me which gas do plants take from the sea", "salt");
  ASSERT_TRUE(part.has_value());
  EXPECT_EQ(part->what, "5-gram");
  EXPECT_DOUBLE_EQ(part->coverage, 7.0 / 8);
  EXPECT_FALSE(index.Find("which gas do plants need", "oxygen").has_value());  // 4 + 1 words in a row, but 4 of 8 covered
  EXPECT_TRUE(index.Find("zero one two three four five six seven eight nine ten", "y").has_value());   // 10 of 20 words
  EXPECT_FALSE(index.Find("zero one two three four five six seven eight nine", "y").has_value());       // 9 of 20
  EXPECT_FALSE(index.Find("Why? Because it is so", "indeed").has_value());  // too short to count inside a text
  EXPECT_EQ(index.Find("why", "not")->item, 2U);
}

TEST(CurateTest, TheLedgerExplainsEveryExample) {
  std::vector<Example> raw;
  SeededRandom random(2);
  for (int i = 0; i < 20; ++i) raw.push_back(Make(Gibberish(random, 8), Gibberish(random, 2)));
  raw.push_back(raw[0]);                                                    // 20
  raw.push_back(Make(QuestionOf(Arc(), raw[1].instruction), "other answer"));  // 21
  raw.push_back(Make(QuestionOf(Arc(), raw[2].instruction) + " indeed", "a b c d e f g h i j k l m"));  // 22
  raw.push_back(Make("Which gas do plants take from the air?", "carbon dioxide"));                  // 23
  raw.push_back(Make("never seen before question about snow", "ice"));                              // 24
  raw.back().extra = {{"judge", {{"keep", false}, {"score", 0.1}}}};
  raw.push_back(Make("cut", ""));                                                                    // 25
  raw.back().extra = {{"rejected", {{"reason", "truncated"}, {"detail", "no end"}}}};
  raw.push_back(Make("What do the seeds say about this", "nothing"));                               // 26
  const std::vector<Example> seeds = {Make("What do the seeds say about this", "all")};
  const std::vector<MultipleChoiceItem> benchmark = {Item("Which gas do plants take from the air?", "carbon dioxide")};
  const CurateSettings settings{.validation_fraction = 0.2, .held_out_fraction = 0.1, .seed_examples = 1, .seed = 5};
  const auto curated = Curate(Arc(), raw, seeds, benchmark, settings);
  ASSERT_THAT(curated, IsOk());
  ASSERT_EQ(curated->ledger.size(), raw.size() + 1);
  const std::map<size_t, std::string> reasons = {{20, "exact_duplicate"}, {21, "same_question"}, {22, "not_novel"},
                                                 {23, "contaminated"},    {24, "low_score"},     {25, "truncated"},
                                                 {26, "same_question"}};
  for (size_t i = 0; i < raw.size(); ++i) {
    const LedgerRow& row = curated->ledger[i];
    EXPECT_EQ(row.index, static_cast<int64_t>(i));
    EXPECT_EQ(row.reason, reasons.count(i) != 0 ? reasons.at(i) : "") << i << " " << row.detail;
    EXPECT_EQ(row.kept_as.empty(), !row.reason.empty()) << i;
  }
  EXPECT_THAT(curated->ledger[26].detail, HasSubstr("seed 0"));
  EXPECT_EQ(curated->validation.size(), 4U);
  EXPECT_EQ(curated->held_out.size(), 2U);
  EXPECT_EQ(curated->train.size(), 14U + 1);
  EXPECT_EQ(curated->counts.at("kept"), 20);
  const auto again = Curate(Arc(), raw, seeds, benchmark, settings);
  for (size_t i = 0; i < curated->ledger.size(); ++i) EXPECT_EQ(ToJson(curated->ledger[i]), ToJson(again->ledger[i]));
}

TEST(CurateTest, NearDuplicatesAreFoundByCharactersWhereWordsDiffer) {
  std::vector<Example> raw = {Make("Photosynthesis happens in which part of green plants", "leaves"),
                              Make("Photosynthesises happens in which parts of greens plants", "leaves"),
                              Make("Magnets attract what", "iron"), Make("Bees collect what", "nectar")};
  const auto curated = Curate(Arc(), raw, {}, {}, {.novelty_threshold = 1, .duplicate_threshold = 0.5});
  ASSERT_THAT(curated, IsOk());
  EXPECT_EQ(curated->ledger[1].reason, "near_duplicate");
  EXPECT_THAT(curated->ledger[1].detail, HasSubstr("example 0"));
  EXPECT_EQ(curated->counts.at("kept"), 3);
}

TEST(CurateTest, SaysWhyNothingIsLeft) {
  std::vector<Example> raw(5, Make("the same question over again", "x"));
  EXPECT_THAT(Curate(Arc(), raw, {}, {}, {}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("'exact_duplicate' (4)")));
  EXPECT_THAT(Curate(Arc(), raw, {}, {}, {.validation_fraction = 0.6, .held_out_fraction = 0.5}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("leave a part to train on")));
  EXPECT_THAT(Curate(Arc(), raw, {}, {}, {.duplicate_threshold = 0}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("duplicate_threshold")));
}

TEST(ExampleTest, SurvivesItsFile) {
  const std::filesystem::path file = std::filesystem::path(::testing::TempDir()) / "data_test_examples.jsonl";
  std::vector<Example> examples = {Make("q \u00e9", "a"), Make("r", "b")};
  examples[1].choices = {"a", "b"};
  examples[1].answer_index = 1;
  examples[1].extra = {{"topic", "t"}};
  ASSERT_THAT(WriteExamples(file, examples), IsOk());
  const auto read = ReadExamples(file);
  ASSERT_THAT(read, IsOk());
  ASSERT_EQ(read->size(), 2U);
  for (size_t i = 0; i < 2; ++i) EXPECT_EQ(ToJson((*read)[i]), ToJson(examples[i]));
  EXPECT_THAT(ReadExamples(file / "none"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("none")));
  EXPECT_THAT(ExampleFromJson({{"instruction", "x"}}, "f:2"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("f:2")));
  EXPECT_THAT(ExampleFromJson({{"instruction", "x"}, {"output", "y"}, {"answer_index", 3}}, "f:2"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("answer_index")));
}

// Oracle: Python, hashlib.sha256(struct.pack("<q3i", 2, 1, 2, 3)).
TEST(EncodedTest, KeysAreDigestsOfTheIds) {
  EXPECT_EQ(TokenKey({1, 2, 3}, 2), "sha256:053bae2c4c65332eba09291d8e41710cc2829f92c436ccf8f3f7fd6aa39d4017");
  EXPECT_NE(TokenKey({1, 2, 3}, 1), TokenKey({1, 2, 3}, 2));
}

}  // namespace
}  // namespace refinery::data
