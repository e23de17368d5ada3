// Task files: what they make of rows, how answers are compared, and the errors that people meet.
#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <cmath>
#include <fstream>

#include "common/files.h"
#include "common/temporary_folder.h"
#include "tests/support/byte_mutator.h"
#include "tests/support/status_matchers.h"
#include "tests/support/vectors.h"
#include "worker/task/data/benchmark.h"
#include "worker/task/eval/exact_match.h"
#include "worker/task/eval/requests.h"
#include "worker/task/eval/task_file.h"

namespace refinery::eval {
namespace {

using nlohmann::json;
using ::refinery::testing::IsOk;
using ::refinery::testing::StatusIs;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr char kRows[] =
    "{\"id\": \"1\", \"question\": \"What melts?\\n\", \"choices\": {\"text\": [\"ice\", \"it's \\\"rock\\\"\"], \"label\": [\"A\", "
    "\"B\"]}, \"answerKey\": \"A\"}\n"
    "{\"id\": \"2\", \"question\": \"What burns?\", \"choices\": {\"text\": [\"water\", \"wood\"], \"label\": [\"1\", \"2\"]}, "
    "\"answerKey\": \"2\"}\n"
    "{\"id\": \"3\", \"question\": \"What flies?\", \"choices\": {\"text\": [\"birds\", \"stones\"], \"label\": [\"A\", \"B\"]}, "
    "\"answerKey\": \"A\"}\n";

class TaskFileTest : public ::testing::Test {
 protected:
  TaskFileTest() : folder_(TemporaryFolder::Make("task-file").value()) {}

  std::string Write(const std::string& name, const std::string& text) {
    const std::filesystem::path path = std::filesystem::path(folder_.path()) / name;
    RF_CHECK(WriteFileAtomically(path, text).ok());
    return path.string();
  }
  Status ErrorOf(const std::string& yaml) { return LoadTaskFile(Write("bad.yaml", yaml), {}).status(); }

  TemporaryFolder folder_;
};

// Goal: a file that spells out ARC-Easy gives the strings of the built-in task, with shots too.
// Oracle: the built-in task, which harness_test.cc compares with the harness' own code.
TEST_F(TaskFileTest, SpellsOutABuiltInTask) {
  Write("rows.jsonl", kRows);
  const std::string yaml = Write("arc.yaml",
                                 "task: my_arc\ntype: multiple_choice\ndata: rows.jsonl\n"
                                 "context: \"Question: {{ question }}\\nAnswer:\"\n"
                                 "choices: \"{{ choices.text }}\"\n"
                                 "answer: \"{{ choices.label.index(answerKey) }}\"\n");
  const auto built_in = data::ReadItems("arc_easy", std::filesystem::path(folder_.path()) / "rows.jsonl");
  ASSERT_THAT(built_in, IsOk());
  for (const size_t shots : {0, 2}) {
    const auto task = LoadTaskFile(yaml, {.shots = shots});
    ASSERT_THAT(task, IsOk());
    EXPECT_EQ(task->name, "my_arc");
    EXPECT_TRUE(task->acc_norm);
    const auto expected = data::WithDrawnShots(*built_in, *built_in, shots, /*exclude=*/true);
    ASSERT_THAT(expected, IsOk());
    ASSERT_EQ(task->items.size(), expected->size());
    for (size_t i = 0; i < task->items.size(); ++i) {
      const auto ours = RequestsOf(task->items[i], {}), theirs = RequestsOf((*expected)[i], {});
      ASSERT_THAT(ours, IsOk());
      EXPECT_EQ(ContextDigest(*ours), ContextDigest(*theirs)) << (*ours)[0].context << (*ours)[0].continuation;
      EXPECT_EQ(task->items[i].gold, (*expected)[i].gold);
    }
  }
}

TEST_F(TaskFileTest, ChoicesMayBeTemplatesAndAnswersTheirText) {
  Write("rows.csv", "word,plural\nmouse,mice\nhouse,houses\n");
  const auto task = LoadTaskFile(Write("plural.yaml",
                                       "type: multiple_choice\ndata: rows.csv\ncontext: \"One {{ word }}, two\"\n"
                                       "choices: [\"{{ word }}s\", \"{{ plural.upper() }}\", \"{{ plural }}\"]\n"
                                       "answer: \"{{ plural }}\"\nmetrics: [acc]\n"),
                                 {.limit = 1});
  ASSERT_THAT(task, IsOk());
  EXPECT_EQ(task->name, "plural");
  EXPECT_FALSE(task->acc_norm);
  ASSERT_EQ(task->items.size(), 1U);
  EXPECT_THAT(task->items[0].continuations, ElementsAre(" mouses", " MICE", " mice"));
  EXPECT_EQ(task->items[0].gold, 2);
}

// Goal: prompts, normalisation and totals of exact match.  Method: a table instead of a model.
TEST_F(TaskFileTest, ExactMatch) {
  Write("rows.jsonl", "{\"q\": \"2+2\", \"a\": \"Four\"}\n{\"q\": \"1+1\", \"a\": \"two\"}\n");
  const auto task = LoadTaskFile(Write("sums.yaml",
                                       "type: exact_match\ndata: rows.jsonl\ncontext: \"Q: {{ q }}\\nA:\"\nanswer: \"{{ a }}\"\n"
                                       "stop: [\"\\n\", \"Q:\"]\nmax_new_tokens: 5\nignore_case: true\n"),
                                 {});
  ASSERT_THAT(task, IsOk());
  EXPECT_THAT(task->exact_match.stop, ElementsAre("\n", "Q:"));
  const auto table = [](const std::vector<std::string>& prompts, const ExactMatchRules& rules) {
    EXPECT_THAT(prompts, ElementsAre("Q: 2+2\nA:", "Q: 1+1\nA:"));
    EXPECT_EQ(rules.max_new_tokens, 5);
    return StatusOr<std::vector<std::string>>({" four ", " three"});
  };
  const auto result = EvaluateExactMatch(*task, table, {});
  ASSERT_THAT(result, IsOk());
  EXPECT_TRUE(result->items[0].correct);
  EXPECT_FALSE(result->items[1].correct);
  ASSERT_EQ(result->figures.size(), 1U);
  EXPECT_EQ(result->figures[0].value, 0.5);
  EXPECT_NEAR(*result->figures[0].standard_error, 0.5, 1e-12);   // sqrt(0.5 / 1) / sqrt(2)
}

// Oracle: exact_match of lm-evaluation-harness 0.4.13 (tests/vectors/eval/make_vectors.py).
TEST(ExactMatchTest, NormalisationEqualsTheHarness) {
  for (const json& one : testing::ReadVectors("eval/figures.json")["exact_match"]) {
    const ExactMatchRules rules{.strip = false, .ignore_case = one[2], .ignore_punctuation = one[3], .ignore_numbers = one[4]};
    EXPECT_EQ(ExactlyMatches(one[0].get<std::string>(), one[1].get<std::string>(), rules), one[5].get<bool>()) << one;
  }
}

// Goal: perplexity of answers is exp of the mean negative log-likelihood.  Method: a table; the error is harness_test.cc's.
TEST_F(TaskFileTest, PerplexityOfAnswers) {
  Write("rows.jsonl", "{\"text\": \"the cat\", \"last\": \"sat\"}\n{\"text\": \"a dog\", \"last\": \"ran\"}\n");
  const auto task = LoadTaskFile(
      Write("last.yaml", "type: perplexity\ndata: rows.jsonl\ncontext: \"{{ text }}\"\nanswer: \"{{ last }}\"\n"), {});
  ASSERT_THAT(task, IsOk());
  EXPECT_EQ(task->kind, TaskItems::Kind::kAnswer);
  const auto table = [](const std::vector<data::ScoreRequest>& requests) -> StatusOr<std::vector<data::Score>> {
    EXPECT_EQ(requests.size(), 2U);
    EXPECT_EQ(requests[1].continuation, " ran");
    return std::vector<data::Score>{{-2.0, 1, true}, {-4.0, 2, false}};
  };
  const auto result = EvaluateAnswerLikelihoods(*task, table, {});
  ASSERT_THAT(result, IsOk());
  EXPECT_NEAR(result->figures[0].value, std::exp(3.0), 1e-9);
  EXPECT_EQ(result->figures[1].value, 0.5);
}

TEST_F(TaskFileTest, PerplexityOfTexts) {
  Write("rows.jsonl", "{\"title\": \"A\", \"page\": \"one two\"}\n");
  const auto task = LoadTaskFile(
      Write("pages.yaml", "type: perplexity\ndata: rows.jsonl\ntext: \"{{ title }}\\n{{ page }}\\n\"\n"), {});
  ASSERT_THAT(task, IsOk());
  EXPECT_EQ(task->kind, TaskItems::Kind::kText);
  EXPECT_THAT(task->pages, ElementsAre("A\none two\n"));
  EXPECT_FALSE(task->detokenize);
}

// Every error names the file and the line, and says what may stand there.
TEST_F(TaskFileTest, SchemaErrorsNameTheirPlace) {
  Write("rows.jsonl", kRows);
  const std::string head = "type: multiple_choice\ndata: rows.jsonl\n";
  const auto invalid = [](const std::string& place, const std::string& what) {
    return StatusIs(absl::StatusCode::kInvalidArgument, AllOf(HasSubstr(place), HasSubstr(what)));
  };
  EXPECT_THAT(ErrorOf("- a\n"), invalid("bad.yaml:1", "mapping"));
  EXPECT_THAT(ErrorOf("type: [\n"), invalid("bad.yaml:", "not YAML"));
  EXPECT_THAT(ErrorOf("data: x\n"), invalid("bad.yaml:1", "'type' is missing"));
  EXPECT_THAT(ErrorOf("data: x\ntype: quiz\n"), invalid("bad.yaml:2", "exact_match"));
  EXPECT_THAT(ErrorOf(head + "contxt: x\n"), invalid("bad.yaml:3", "unknown key 'contxt'"));
  EXPECT_THAT(ErrorOf(head + "context: x\ncontext: y\n"), invalid("bad.yaml:4", "twice"));
  EXPECT_THAT(ErrorOf(head + "context: x\nchoices: [a, b]\n"), invalid("bad.yaml:1", "'answer' is missing"));
  EXPECT_THAT(ErrorOf(head + "context: \"{{ question\"\nchoices: [a, b]\nanswer: a\n"), invalid("bad.yaml:3", "no template"));
  EXPECT_THAT(ErrorOf(head + "context: x\nchoices: [a]\nanswer: a\n"), invalid("bad.yaml:4", "two or more"));
  EXPECT_THAT(ErrorOf(head + "context: x\nchoices: [a, b]\nanswer: a\nshots: many\n"), invalid("bad.yaml:6", "whole number"));
  EXPECT_THAT(ErrorOf(head + "context: x\nchoices: [a, b]\nanswer: a\nmetrics: [f1]\n"), invalid("bad.yaml:6", "acc_norm"));
  EXPECT_THAT(ErrorOf(head + "task: a/b\ncontext: x\nchoices: [a, b]\nanswer: a\n"), invalid("bad.yaml:3", "slashes"));
  // Rows that the templates do not fit.
  EXPECT_THAT(ErrorOf(head + "context: \"{{ quest }}\"\nchoices: [a, b]\nanswer: a\n"), invalid("rows.jsonl:1", "'context' fails"));
  EXPECT_THAT(ErrorOf(head + "context: x\nchoices: [a, b]\nanswer: c\n"), invalid("rows.jsonl:1", "one of the choices"));
  EXPECT_THAT(ErrorOf(head + "context: x\nchoices: \"{{ question }}\"\nanswer: 0\n"), invalid("rows.jsonl:1", "list of two"));
  EXPECT_THAT(LoadTaskFile("/nowhere/task.yaml", {}), StatusIs(absl::StatusCode::kNotFound, HasSubstr("/nowhere/task.yaml")));
}

// Goal: no text makes the reader crash or run on.  Method: good files with pieces changed; some still say something.
TEST_F(TaskFileTest, SurvivesAnyText) {
  Write("rows.jsonl", kRows);
  const std::string good[] = {
      "task: mine\ntype: multiple_choice\ndata: rows.jsonl\nshots: 1\ndescription: \"Say it.\\n\"\ncontext: \"{{ question }}\"\n"
      "choices: [\"{{ choices.text[0] }}\", \"{{ choices.text[1] }}\"]\nanswer: \"0\"\nmetrics: [acc, acc_norm]\n",
      "type: multiple_choice\ndata: rows.jsonl\ncontext: \"{{ question }}\"\nchoices: \"{{ choices.text }}\"\nanswer: 1\ndelimiter: \"\\n\"\n",
      "type: exact_match\ndata: rows.jsonl\npool: rows.jsonl\nshots: 2\ncontext: \"{{ question | upper }}\"\n"
      "answer: \"{% if id %}{{ id }}{% endif %}\"\nstop: [\".\", \"\\n\"]\nmax_new_tokens: 8\nstrip: true\n",
      "type: perplexity\ndata: rows.jsonl\ntext: \"{{ question }} {{ choices.text[1] }}\\n\"\ndetokenize: true\n"};
  const std::vector<std::string> words = {"{{", "}}", "{%", "%}", "&a ", "*a", "- ", ": ", "|\n", "---\n", "[", "]", "{}", "null", "-1", "101",
                                          "shots: 99999999999", "range(1000000000)", "{% for x in y %}", "{{ 'a' * 100000000 }}"};
  int accepted = 0;
  for (uint32_t seed = 1; seed <= 2'000; ++seed) {
    const std::string text = testing::ByteMutator(seed).Bytes(good[seed % 4], words);
    const std::filesystem::path path = std::filesystem::path(folder_.path()) / "some.yaml";
    std::ofstream(path, std::ios::binary | std::ios::trunc) << text;
    const auto task = LoadTaskFile(path.string(), {});
    accepted += task.ok();
    if (!task.ok()) {
      EXPECT_FALSE(Message(task.status()).empty());
    }
  }
  EXPECT_GT(accepted, 20);
}

}  // namespace
}  // namespace refinery::eval
