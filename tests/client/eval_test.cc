// `refinery eval` as a user meets it: a table and items on a real model where there is one, one clear sentence where not.

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "common/files.h"
#include "common/temporary_folder.h"
#include "tests/support/run_program.h"
#include "tests/support/status_matchers.h"

namespace refinery {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::Output;
using testing::RunProgram;

constexpr char kTaskFile[] =
    "task: echo\ntype: exact_match\ndata: rows.jsonl\ncontext: \"{{ q }}\"\nanswer: \"{{ a }}\"\nmax_new_tokens: 4\n";

class EvalCommandTest : public ::testing::Test {
 protected:
  EvalCommandTest() : folder_(TemporaryFolder::Make("refinery-eval").value()) {
    const char* named = std::getenv("REFINERY_TEST_MODEL");
    const char* home = std::getenv("HOME");
    model_ = named != nullptr ? named : Join(home == nullptr ? "" : home, "/.cache/refinery/models/SmolLM2-135M-Instruct.Q4_1.gguf");
  }

  void SetUp() override {
    if (!std::filesystem::exists(REFINERY_BINARY_DIR "/bin/refinery-task")) GTEST_SKIP() << "refinery-task is not built";
  }

  Output Eval(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), {REFINERY_BINARY_DIR "/bin/refinery", "eval"});
    arguments.insert(arguments.end(), {"--cache", REFINERY_BINARY_DIR "/test_cache"});
    return RunProgram(arguments, {{"HOME", folder_.path()}, {"REFINERY_DATA_DIR", ""}});
  }

  std::string Path(const std::string& name) const { return Join(folder_.path(), "/", name); }
  std::string Write(const std::string& name, const std::string& text) {
    EXPECT_TRUE(WriteFileAtomically(Path(name), text).ok());
    return Path(name);
  }
  void WriteItems(int count) {
    std::string rows;
    for (int i = 0; i < count; ++i) {
      const json row = {{"goal", Join("To cut bread number ", i, ", use")}, {"sol1", "a knife"}, {"sol2", "the moon"}, {"label", i % 2}};
      rows += row.dump() + "\n";
    }
    Write("data/piqa/validation.jsonl", rows);
  }

  TemporaryFolder folder_;
  std::string model_;
};

TEST_F(EvalCommandTest, WrongInputIsOneSentence) {
  const Output unknown = Eval({"/no/model", "--tasks", "alchemy"});
  EXPECT_EQ(unknown.code, 2);
  EXPECT_THAT(unknown.out, IsEmpty());
  EXPECT_THAT(unknown.err, AllOf(HasSubstr("'alchemy'"), HasSubstr("commonsense_qa"), HasSubstr("mmlu_stem")));
  const Output missing = Eval({"/no/model", "--tasks", "piqa"});
  EXPECT_EQ(missing.code, 2);
  EXPECT_THAT(missing.err, HasSubstr("refinery data pull piqa"));
  WriteItems(2);
  const Output model = Eval({"/no/model", "--tasks", "piqa", "--data", Path("data")});
  EXPECT_EQ(model.code, 2);
  EXPECT_THAT(model.err, HasSubstr("/no/model"));
  const Output version = Eval({"/no/model", "--tasks", "piqa", "--harness-version", "latest"});
  EXPECT_EQ(version.code, 2);
  EXPECT_THAT(version.err, HasSubstr("0.4.13"));
}

// Goal: figures, items and the comparison agree with each other: a model compared with itself differs nowhere.
TEST_F(EvalCommandTest, ScoresAndComparesARealModel) {
  if (!std::filesystem::exists(model_)) GTEST_SKIP() << "no model at " << model_ << "; set REFINERY_TEST_MODEL";
  WriteItems(6);
  Write("rows.jsonl", "{\"q\": \"1 2 3 4 5\", \"a\": \"6\"}\n{\"q\": \"A B C D\", \"a\": \"E\"}\n");
  const std::string tasks = Join("piqa,", Write("echo.yaml", kTaskFile));
  const Output output = Eval({model_, "--tasks", tasks, "--data", Path("data"), "--compare", model_, "--output", "json",
                              "--items", Path("items"), "--threads", "2"});
  ASSERT_EQ(output.code, 0) << output.err;
  const json report = json::parse(output.out);
  ASSERT_EQ(report["results"].size(), 3U);
  double right = 0;
  std::ifstream items(Path("items/A/piqa.jsonl"));
  for (std::string line; std::getline(items, line);) {
    const json item = json::parse(line);
    EXPECT_EQ(item["log_likelihoods"].size(), 2U);
    right += item["prediction"] == item["gold"] ? 1 : 0;
  }
  EXPECT_EQ(report["results"][0]["metric"], "acc");
  EXPECT_DOUBLE_EQ(report["results"][0]["value"].get<double>(), right / 6);
  EXPECT_EQ(report["results"][2]["task"], "echo");
  EXPECT_EQ(report["compared_with"]["results"], report["results"]);
  for (const json& one : report["comparison"]) {
    EXPECT_EQ(one["difference"], 0.0);
    EXPECT_EQ(one["mcnemar_p"], 1.0);
  }
  EXPECT_TRUE(std::filesystem::exists(Path("items/B/echo.jsonl")));
}

}  // namespace
}  // namespace refinery
