// Benchmark rows against the prompts that lm-evaluation-harness 0.4.13 built from them (../shared/data/gold), and the rules
// of its templates that those rows do not exercise.
#include "worker/task/data/benchmark.h"

#include "tests/support/status_matchers.h"
#include "worker/task/data/random.h"
#include "worker/task/data/text.h"

namespace refinery::data {
namespace {

using nlohmann::json;
using ::refinery::testing::IsOk;
using ::refinery::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::filesystem::path SharedData() { return std::filesystem::path(REFINERY_SOURCE_DIR) / ".." / "shared" / "data"; }

const char* const kTasks[] = {"arc_easy",   "commonsense_qa", "hellaswag",   "mmlu",
                              "openbookqa", "piqa",           "social_i_qa", "winogrande"};

// Compares every string of every item with the gold file of that subset and shot count.
void ExpectGold(const std::vector<MultipleChoiceItem>& items, const std::string& gold_name) {
  const auto gold = ReadJsonLines(SharedData() / "gold" / gold_name);
  ASSERT_THAT(gold, IsOk());
  ASSERT_EQ(gold->size(), items.size());
  for (size_t i = 0; i < items.size(); ++i) {
    const json& row = (*gold)[i];
    SCOPED_TRACE(Join(gold_name, " row ", i));
    EXPECT_EQ(items[i].gold, row["gold"].get<int64_t>());
    EXPECT_EQ(items[i].choices, row["choices"].get<std::vector<std::string>>());
    ASSERT_EQ(items[i].continuations.size(), row["requests"].size());
    for (size_t c = 0; c < row["requests"].size(); ++c) {
      EXPECT_EQ(items[i].ContextOf(c), row["requests"][c]["context"].get<std::string>());
      EXPECT_EQ(items[i].continuations[c], row["requests"][c]["continuation"].get<std::string>());
    }
  }
}

TEST(BenchmarkTest, ZeroShotStringsEqualTheHarnessForAllEightTasks) {
  if (!std::filesystem::exists(SharedData() / "gold")) GTEST_SKIP() << "no ../shared/data";
  for (const std::string task : kTasks) {
    const auto items = ReadItems(task, SharedData() / "tasks" / task / "dev.jsonl");
    ASSERT_THAT(items, IsOk());
    ExpectGold(*items, task + ".dev.0shot.jsonl");
  }
}

// The shots themselves are drawn: the few-shot text is only right when CPython's generator is reproduced.
TEST(BenchmarkTest, FiveShotStringsEqualTheHarness) {
  if (!std::filesystem::exists(SharedData() / "gold")) GTEST_SKIP() << "no ../shared/data";
  for (const std::string task : {"arc_easy", "hellaswag", "mmlu", "winogrande"}) {
    const auto items = ReadItems(task, SharedData() / "tasks" / task / "dev30.jsonl");
    const auto pool = ReadItems(task, SharedData() / "tasks" / task / "fewshot.jsonl");
    ASSERT_THAT(items, IsOk());
    ASSERT_THAT(pool, IsOk());
    const auto prompted = WithHarnessShots(*items, *pool, 5);
    ASSERT_THAT(prompted, IsOk());
    ExpectGold(*prompted, task + ".dev30.5shot.jsonl");
  }
}

// Method: rows that follow the templates' own rules, worked out by hand.
TEST(BenchmarkTest, HellaSwagCleansWikiHowTextAsTheHarnessDoes) {
  const json row = {{"activity_label", "Cars"}, {"ctx_a", "A [header] How to x [title] Do it. [step] abc  [substeps] d "},
                    {"ctx_b", "the MAN writes IBM"}, {"endings", {"a [b", "[x]y", "c", "d [e\nf] g"}}, {"label", "2"}};
  const auto item = ItemFromRow("hellaswag", row, "row");
  ASSERT_THAT(item, IsOk());
  EXPECT_EQ(item->ContextOf(0), "Cars: A How to x. Do it. abc  d The man writes ibm");
  EXPECT_THAT(item->answers, ElementsAre("a [b", "y", "c", "d [e\nf] g"));
  EXPECT_EQ(item->gold, 2);
}

TEST(BenchmarkTest, WinograndeScoresTheSameTextBehindTwoContexts) {
  const json row = {{"sentence", "Ann met Bea and _  smiled. "}, {"option1", "Ann"}, {"option2", "Bea"}, {"answer", "2"}};
  const auto item = ItemFromRow("winogrande", row, "row");
  ASSERT_THAT(item, IsOk());
  EXPECT_EQ(item->ContextOf(0), "Ann met Bea and Ann");
  EXPECT_EQ(item->ContextOf(1), "Ann met Bea and Bea");
  EXPECT_THAT(item->continuations, ElementsAre(" smiled.", " smiled."));
  const Example example = ExampleFromItem(*item);
  EXPECT_EQ(example.instruction, "Ann met Bea and Bea");
  EXPECT_EQ(example.output, "smiled.");
}

TEST(BenchmarkTest, ExamplesShareTheFormatOfTheTask) {
  const json row = {{"question", " Where? "}, {"choices", {{"text", {"a", "b", "c", "d", "e"}},
                    {"label", {"A", "B", "C", "D", "E"}}}}, {"answerKey", "D"}};
  const auto item = ItemFromRow("commonsense_qa", row, "row");
  ASSERT_THAT(item, IsOk());
  const Example example = ExampleFromItem(*item);
  EXPECT_EQ(example.instruction, "Question: Where?\nA. a\nB. b\nC. c\nD. d\nE. e\nAnswer:");
  EXPECT_EQ(example.output, "D");
  EXPECT_EQ(example.choices.at(static_cast<size_t>(example.answer_index)), "D");
}

TEST(BenchmarkTest, ErrorsNameFileLineAndField) {
  const json choices = {{"text", {"x", "y"}}, {"label", {"A", "B"}}};
  EXPECT_THAT(ItemFromRow("arc_easy", {{"question", "q"}, {"choices", choices}}, "dev.jsonl:3"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("dev.jsonl:3: arc_easy row: field 'answerKey' is missing")));
  EXPECT_THAT(ItemFromRow("arc_easy", {{"question", 7}, {"choices", choices}, {"answerKey", "A"}}, "f:1"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("field 'question' must hold text")));
  EXPECT_THAT(ItemFromRow("arc_easy", {{"question", "q"}, {"choices", choices}, {"answerKey", "C"}}, "f:1"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("'C'")));
  EXPECT_THAT(ItemFromRow("piqa", {{"goal", "g"}, {"sol1", "a"}, {"sol2", "b"}, {"label", -1}}, "f:1"),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("splits without answers")));
  EXPECT_THAT(ItemFromRow("hellaswag", {{"activity_label", "a"}, {"ctx_a", "b"}, {"ctx_b", ""}, {"endings", {"x"}}, {"label", ""}},
                          "f:1"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("holds 1 choices, expected 4")));
  EXPECT_THAT(ItemFromRow("arc_easy", json::array(), "f:1"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("f:1")));
  EXPECT_THAT(ItemFromRow("boolq", json::object(), "f:1"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("winogrande")));
}

// Oracle: CPython 3.11, random.Random(1234).sample(range(n), k), first two draws; n of the official training splits.
TEST(PythonRandomTest, SamplesAsCPythonDoes) {
  PythonRandom raw(1234);
  EXPECT_EQ(raw.Next(), 4150886329U);
  EXPECT_EQ(raw.Next(), 3342196574U);
  EXPECT_EQ(raw.Next(), 1892932127U);
  struct Golden {
    size_t rows, drawn;
    std::vector<size_t> first, second;
  };
  for (const Golden& golden : std::vector<Golden>{
           {2251, 5, {1805, 478, 30, 371, 143}, {343, 403, 1452, 969, 71}},                             // arc_easy
           {4957, 5, {3610, 957, 61, 742, 4769}, {286, 687, 806, 2905, 1939}},                          // openbookqa
           {39905, 6, {28883, 7657, 490, 5940, 38156, 2288}, {5500, 6450, 23241, 15519, 1142, 2019}},   // hellaswag
           {16113, 6, {15834, 12749, 7220, 1914, 122, 1485}, {14925, 15442, 15388, 13221, 9539, 572}},  // piqa
           {33410, 6, {28883, 7657, 490, 5940, 2288, 5500}, {6450, 23241, 15519, 1142, 2019, 1038}},    // social_i_qa
           {40398, 6, {28883, 7657, 490, 5940, 38156, 2288}, {5500, 6450, 23241, 15519, 1142, 2019}},   // winogrande
           {9741, 6, {7220, 1914, 122, 1485, 9539, 572}, {1375, 1612, 5810, 3879, 285, 504}}}) {        // commonsense_qa
    PythonRandom random(1234);
    EXPECT_EQ(random.Sample(golden.rows, golden.drawn), golden.first) << golden.rows;
    EXPECT_EQ(random.Sample(golden.rows, golden.drawn), golden.second) << golden.rows;
  }
}

// Oracle: str.capitalize, str.strip and len of CPython 3.11.
TEST(TextTest, FollowsPythonOnUnicode) {
  EXPECT_EQ(Capitalize("éCOLE ÀÉ"), "École àé");
  EXPECT_EQ(Capitalize("ßA"), "Ssa");
  EXPECT_EQ(Capitalize(""), "");
  EXPECT_EQ(Strip("\u00a0\u2009 a b\u3000\x1c\n"), "a b");
  EXPECT_EQ(Strip("\u00e9"), "\u00e9");
  EXPECT_EQ(CodePoints("na\u00efve \U0001F600"), 7U);
  EXPECT_EQ(CodePoints("\xff\xfe"), 2U);
}

}  // namespace
}  // namespace refinery::data
