#include "worker/task/calibration.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <set>

#include "common/files.h"
#include "tests/support/status_matchers.h"
#include "tests/worker/task/generate/small_tokenizer.h"

namespace refinery::task {
namespace {

namespace fs = std::filesystem;
using ::refinery::testing::IsOk;
using ::refinery::testing::SmallTokenizer;
using ::refinery::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

class CalibrationTest : public ::testing::Test {
 protected:
  std::vector<data::Example> Examples(int count) {
    std::vector<data::Example> examples;
    for (int i = 0; i < count; ++i)
      examples.push_back({.instruction = Join("Question number ", i * i * 7919 % 1000, ": what comes after ", std::string(9, static_cast<char>('a' + i % 26)), "?"),
                          .output = std::string(7, static_cast<char>('b' + i % 25))});
    return examples;
  }
  // The ids of the documents that a stream is made of, each with its two line breaks.
  std::vector<int32_t> Ids(const std::string& text) { return tokenizer_.get()->Encode(text + "\n\n").value(); }

  SmallTokenizer tokenizer_{"smollm"};
};

// Goal: windows are whole documents laid end to end, nothing between them and nothing lost.  Method: the windows joined again are cut
// at each document's ids; every document is used once before any is used twice.
TEST_F(CalibrationTest, WindowsAreDocumentsEndToEndWithoutPadding) {
  const auto examples = Examples(12);
  const auto calibration = MakeCalibration({.examples = &examples, .duplicate_threshold = 0.99, .tokens = 640, .sequence_length = 64}, *tokenizer_.get());
  ASSERT_THAT(calibration, IsOk());
  ASSERT_EQ(calibration->sequences.size(), 10u);
  std::vector<int32_t> stream;
  for (const auto& sequence : calibration->sequences) {
    ASSERT_EQ(sequence.size(), 64u);
    stream.insert(stream.end(), sequence.begin(), sequence.end());
  }
  std::vector<std::vector<int32_t>> documents;
  for (const data::Example& example : examples) documents.push_back(Ids(ExampleText(example)));
  size_t place = 0;
  std::vector<int> uses(documents.size(), 0);
  while (place < stream.size()) {
    bool found = false;
    for (size_t d = 0; d < documents.size() && !found; ++d) {
      const size_t length = std::min(documents[d].size(), stream.size() - place);
      if (!std::equal(stream.begin() + static_cast<int64_t>(place), stream.begin() + static_cast<int64_t>(place + length), documents[d].begin())) continue;
      found = true;
      place += length;
      ++uses[d];
    }
    ASSERT_TRUE(found) << "at " << place;
  }
  const auto [least, most] = std::minmax_element(uses.begin(), uses.end());
  EXPECT_LE(*most - *least, 1);
  EXPECT_EQ(calibration->examples.documents, 12);
  const std::set<int32_t> distinct(stream.begin(), stream.end());
  EXPECT_EQ(calibration->distinct_ids, static_cast<int64_t>(distinct.size()));
  EXPECT_EQ(calibration->tokens, 640);
  // The same again, and another order with another seed.
  EXPECT_EQ(MakeCalibration({.examples = &examples, .duplicate_threshold = 0.99, .tokens = 640, .sequence_length = 64}, *tokenizer_.get())->sequences,
            calibration->sequences);
  EXPECT_NE(MakeCalibration({.examples = &examples, .duplicate_threshold = 0.99, .tokens = 640, .sequence_length = 64, .seed = 5}, *tokenizer_.get())->sequences,
            calibration->sequences);
}

TEST_F(CalibrationTest, RepeatedDocumentsAreLeftOutAlsoAcrossSources) {
  auto examples = Examples(6);
  examples.push_back(examples[2]);
  data::Example shouted = examples[3];
  shouted.instruction += "?!";  // only punctuation more
  examples.push_back(shouted);
  const std::vector<std::string> general = {"The quick brown fox jumps over the lazy dog near the river bank.", ExampleText(examples[0]),
                                            "An entirely different paragraph about the sea, ships and their harbours."};
  const CalibrationRequest request{.examples = &examples, .general = general, .general_share = 0.25, .duplicate_threshold = 0.99,
                                   .tokens = 4000, .sequence_length = 50};
  const auto calibration = MakeCalibration(request, *tokenizer_.get());
  ASSERT_THAT(calibration, IsOk());
  EXPECT_EQ(calibration->examples.documents, 6);
  EXPECT_EQ(calibration->examples.duplicates, 2);
  EXPECT_EQ(calibration->general.documents, 2);
  EXPECT_EQ(calibration->general.duplicates, 1);
  EXPECT_EQ(calibration->examples.windows, 60);
  EXPECT_EQ(calibration->general.windows, 20);
  EXPECT_GT(calibration->general.passes, 1);
  const nlohmann::json facts = calibration->Facts(request);
  EXPECT_EQ(facts["general"]["windows"], 20);
  EXPECT_EQ(facts["distinct_ids"], calibration->distinct_ids);
}

TEST_F(CalibrationTest, MissingTextIsNamed) {
  const std::vector<data::Example> none, some = Examples(3);
  EXPECT_THAT(MakeCalibration({.examples = &none, .tokens = 64, .sequence_length = 32}, *tokenizer_.get()),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("no curated examples")));
  EXPECT_THAT(MakeCalibration({.examples = &some, .general_share = 0.5, .tokens = 64, .sequence_length = 32}, *tokenizer_.get()),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("quantize.gptq.calibration.general")));
}

TEST_F(CalibrationTest, DocumentsOfTextAndOfRows) {
  const fs::path folder = fs::path(::testing::TempDir()) / "documents";
  ASSERT_THAT(WriteFileAtomically(folder / "a.txt", "\n one\nstill one\n\n  \ntwo \n\n\n"), IsOk());
  EXPECT_THAT(ReadDocuments(folder / "a.txt").value(), ElementsAre("one\nstill one", "two"));
  ASSERT_THAT(WriteFileAtomically(folder / "b.jsonl", "{\"text\": \"three\"}\n{\"instruction\": \"four\", \"input\": \"\", \"output\": \"five\", \"origin\": \"seed\"}\n"), IsOk());
  EXPECT_THAT(ReadDocuments(folder / "b.jsonl").value(), ElementsAre("three", "four five"));
  ASSERT_THAT(WriteFileAtomically(folder / "c.jsonl", "{\"text\": \"three\"}\n{\"body\": 1}\n"), IsOk());
  EXPECT_THAT(ReadDocuments(folder / "c.jsonl"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("c.jsonl:2")));
}

}  // namespace
}  // namespace refinery::task
