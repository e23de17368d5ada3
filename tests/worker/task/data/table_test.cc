// Tables against what pyarrow reads from the same files (tests/vectors/table), and the errors of broken ones.
#include "worker/task/data/table.h"

#include <algorithm>

#include "common/files.h"
#include "common/temporary_folder.h"
#include "tests/support/status_matchers.h"
#include "worker/task/data/benchmark.h"
#include "worker/task/data/example.h"

namespace refinery::data {
namespace {

namespace fs = std::filesystem;
using ::refinery::testing::IsOk;
using ::refinery::testing::IsOkAndHolds;
using ::refinery::testing::StatusIs;
using ::testing::HasSubstr;

constexpr auto kInvalid = absl::StatusCode::kInvalidArgument;
const fs::path kVectors = REFINERY_SOURCE_DIR "/tests/vectors/table";

class TableTest : public ::testing::Test {
 protected:
  fs::path Write(const std::string& name, const std::string& text) {
    EXPECT_THAT(WriteFileAtomically(Folder() / name, text), IsOk());
    return Folder() / name;
  }
  Status Read(const std::string& name, const std::string& text) {
    return ForEachTableRow(Write(name, text), {}, 0, [](std::string_view, size_t) { return absl::OkStatus(); });
  }
  fs::path Folder() const { return folder_.path(); }
  TemporaryFolder folder_ = TemporaryFolder::Make("table-test").value();
};

// Goal: every type, encoding and codec gives the rows that pyarrow gives, byte for byte.
TEST_F(TableTest, RowsEqualThoseOfPyarrow) {
  size_t files = 0;
  for (const auto& entry : fs::directory_iterator(kVectors)) {
    fs::path expected = entry.path().string() + ".expected";
    if (!fs::exists(expected)) continue;
    ++files;
    fs::path output = Folder() / "rows.jsonl";
    auto rows = ConvertTables({entry.path()}, {}, output);
    ASSERT_THAT(rows, IsOk()) << entry.path();
    std::string text = ReadFile(expected).value();
    EXPECT_EQ(*rows, static_cast<size_t>(std::count(text.begin(), text.end(), '\n'))) << entry.path();
    EXPECT_EQ(ReadFile(output).value(), text) << entry.path();
  }
  EXPECT_EQ(files, 15u);
}

TEST_F(TableTest, ColumnsAreChosenAndFilesFollowOneAnother) {
  fs::path output = Folder() / "rows.jsonl";
  EXPECT_THAT(ConvertTables({kVectors / "nested_snappy.parquet", kVectors / "nested_stream.arrow"}, {"three", "id"}, output),
              IsOkAndHolds(size_t{8}));
  std::string text = ReadFile(output).value();
  EXPECT_TRUE(text.starts_with("{\"id\":\"one\",\"three\":[1,2,3]}\n")) << text;
  EXPECT_EQ(text.substr(0, text.size() / 2), text.substr(text.size() / 2));
  EXPECT_THAT(ConvertTables({kVectors / "nested_snappy.parquet"}, {"no_such"}, output),
              StatusIs(kInvalid, HasSubstr("nested_snappy.parquet: there is no column 'no_such'; there are id, choices")));
  EXPECT_EQ(ReadFile(output).value(), text) << "a failed conversion must leave the output alone";
}

TEST_F(TableTest, AtMostSoManyRows) {
  size_t seen = 0;
  ASSERT_THAT(ForEachTableRow(kVectors / "texts_gzip.parquet", {}, 257, [&](std::string_view, size_t row) {
                EXPECT_EQ(row, ++seen);
                return absl::OkStatus();
              }), IsOk());
  EXPECT_EQ(seen, 257u);
}

TEST_F(TableTest, BrokenFilesAreRefusedWithTheirRow) {
  EXPECT_THAT(Read("a.csv", "q,a\n1,2\n3\n"), StatusIs(kInvalid, HasSubstr("a.csv: row 2 (line 3): it has 1 cells, the header has 2")));
  EXPECT_THAT(Read("a.csv", "q,a\n1,\"2\n"), StatusIs(kInvalid, HasSubstr("line 2: a quoted cell does not end")));
  EXPECT_THAT(Read("a.csv", "q,a\n1,\"2\"x\n"), StatusIs(kInvalid, HasSubstr("line 2: there is text behind the closing quote")));
  EXPECT_THAT(Read("a.csv", "q,a\n1,2\"x\n"), StatusIs(kInvalid, HasSubstr("a quote stands within a cell")));
  EXPECT_THAT(Read("a.csv", "q,q\n"), StatusIs(kInvalid, HasSubstr("two columns are named 'q'")));
  EXPECT_THAT(Read("a.csv", "q,\n"), StatusIs(kInvalid, HasSubstr("column 2 has no name")));
  EXPECT_THAT(Read("a.csv", "q\n\xff\n"), StatusIs(kInvalid, HasSubstr("line 2: cell 1 is not valid UTF-8")));
  EXPECT_THAT(Read("a.csv", ""), StatusIs(kInvalid, HasSubstr("empty")));
  EXPECT_THAT(Read("a.json", "[{\"a\":1}, 7]"), StatusIs(kInvalid, HasSubstr("a.json: row 2: line 1: expected a JSON object")));
  EXPECT_THAT(Read("a.json", "[{\"a\":1},]"), StatusIs(kInvalid, HasSubstr("row 2")));
  EXPECT_THAT(Read("a.json", "[{\"a\":1} {\"a\":2}]"), StatusIs(kInvalid, HasSubstr("expected ',' or ']'")));
  EXPECT_THAT(Read("a.json", "[{\"a\":1}"), StatusIs(kInvalid, HasSubstr("the list does not end")));
  EXPECT_THAT(Read("a.json", "[{\"a\":1}] x"), StatusIs(kInvalid, HasSubstr("text behind the list")));
  EXPECT_THAT(Read("a.json", "[{\"a\":tru}]"), StatusIs(kInvalid, HasSubstr("row 1: not valid JSON")));
  EXPECT_THAT(Read("a.jsonl", "{\"a\":1}\n\n{\n"), StatusIs(kInvalid, HasSubstr("line 3: not valid JSON")));
  EXPECT_THAT(Read("a.parquet", "PAR2"), StatusIs(kInvalid, HasSubstr("no Parquet file")));
  EXPECT_THAT(Read("a.parquet", "PAR1PAR1"), StatusIs(kInvalid, HasSubstr("damaged Parquet file")));
  EXPECT_THAT(Read("a.xml", "<a/>"), StatusIs(kInvalid, HasSubstr("its format is not known")));
  EXPECT_THAT(ForEachTableRow(Folder() / "none.csv", {}, 0, {}), StatusIs(absl::StatusCode::kNotFound, HasSubstr("none.csv")));
}

// Goal: examples and benchmark rows come out the same whatever file holds them.
TEST_F(TableTest, ExamplesAreReadFromEveryFormat) {
  const std::string row = R"({"input":"","instruction":"Say, \"hi\"","output":"hi","choices":["hi","ho"],"answer_index":0})";
  fs::path files[] = {
      Write("e.jsonl", row + "\n"), Write("e.json", "[" + row + "]"),
      Write("e.csv", "instruction,output,choices,answer_index\n\"Say, \"\"hi\"\"\",hi,\"[\"\"hi\"\",\"\"ho\"\"]\",0\n")};
  for (const fs::path& file : files) {
    auto examples = ReadExamples(file);
    ASSERT_THAT(examples, IsOk()) << file;
    ASSERT_EQ(examples->size(), 1u);
    EXPECT_EQ(ToJson(examples->front()), nlohmann::json::parse(row)) << file;
  }
  EXPECT_THAT(ReadExamples(Write("x.csv", "instruction,result\na,b\n")),
              StatusIs(kInvalid, HasSubstr("x.csv: row 1: field 'output' is missing")));
}

TEST_F(TableTest, BenchmarkRowsAreReadFromCsvAndParquet) {
  auto items = ReadItems("arc_easy", Write("i.csv", "id,question,choices,answerKey\n"
                                                    "7,Why?,\"{\"\"text\"\":[\"\"a\"\",\"\"b\"\"],\"\"label\"\":[\"\"A\"\",\"\"B\"\"]}\",B\n"));
  ASSERT_THAT(items, IsOk());
  EXPECT_EQ(items->front().gold, 1);
  EXPECT_EQ(items->front().answers, (std::vector<std::string>{"a", "b"}));
  items = ReadItems("piqa", Write("p.csv", "goal,sol1,sol2,label\ng,x,y,1\n"));
  ASSERT_THAT(items, IsOk());
  EXPECT_EQ(items->front().gold, 1);
  EXPECT_THAT(ReadItems("arc_easy", kVectors / "nested_snappy.parquet"),
              StatusIs(kInvalid, HasSubstr("nested_snappy.parquet: row 1: arc_easy row: field 'question' is missing")));
}

}  // namespace
}  // namespace refinery::data
