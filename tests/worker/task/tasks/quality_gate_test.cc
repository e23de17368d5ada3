#include "worker/task/quality_gate.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "common/files.h"
#include "common/temporary_folder.h"
#include "tests/support/status_matchers.h"
#include "tests/worker/task/generate/small_tokenizer.h"
#include "worker/task/calibration.h"
#include "worker/task/data/example.h"

namespace refinery::task {
namespace {

using ::refinery::testing::IsOk;
using ::refinery::testing::SmallTokenizer;
using ::refinery::testing::StatusIs;
using ::testing::AllOf;
using ::testing::HasSubstr;

// 100 tokens at 3.0 nats, from a source at 2.5: a ratio of e^0.5 = 1.6487.
constexpr quantize::Fidelity kFigures{.tokens = 100, .source_perplexity = 12.182494, .perplexity = 20.085537, .kl = 0.25};

// Goal: a bound holds up to its value and stops above it, each with its own words.
TEST(QualityGateTest, BoundsAreHeldAndNamed) {
  EXPECT_THAT(CheckGate({}, kFigures, "recovered"), IsOk());
  EXPECT_THAT(CheckGate({.max_kl = 0.25, .max_ppl_ratio = 1.65}, kFigures, "recovered"), IsOk());
  EXPECT_THAT(CheckGate({.max_kl = 0.24}, kFigures, "recovered"),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("the recovered model's KL"), HasSubstr("0.25 nats on 100"), HasSubstr("quantize.gptq.max_kl 0.24"))));
  EXPECT_THAT(CheckGate({.max_kl = 1, .max_ppl_ratio = 1.64}, kFigures, "quantized"),
              StatusIs(absl::StatusCode::kFailedPrecondition,
                       AllOf(HasSubstr("the quantized model's perplexity"), HasSubstr("1.648"), HasSubstr("quantize.gptq.max_ppl_ratio 1.64"))));
}

// Goal: a figure that is not a number passes no bound.
TEST(QualityGateTest, NotANumberIsAbove) {
  const quantize::Fidelity broken{.tokens = 1, .source_perplexity = 0, .perplexity = 0, .kl = std::nan("")};
  EXPECT_THAT(CheckGate({.max_kl = 1}, broken, "quantized"), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("max_kl")));
  EXPECT_THAT(CheckGate({.max_ppl_ratio = 2}, broken, "quantized"), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("max_ppl_ratio")));
}

class HeldOutTextTest : public ::testing::Test {
 protected:
  HeldOutTextTest() {
    std::filesystem::create_directories(Folder());
    context_.inputs = folder_.path();
  }
  std::filesystem::path Folder() const { return std::filesystem::path(folder_.path()) / "examples"; }
  void Write(const std::string& rows) { ASSERT_THAT(WriteFileAtomically(Folder() / "held_out.jsonl", rows), IsOk()); }

  TemporaryFolder folder_ = TemporaryFolder::Make("refinery-gate").value();
  EventWriter events_;
  TaskContext context_{.events = events_};
  SmallTokenizer tokenizer_{"smollm"};
};

// Goal: examples until there are enough tokens, long ones cut.
TEST_F(HeldOutTextTest, TakesExamplesUntilThereAreEnough) {
  const std::string row = R"({"instruction": "What is the capital of France, and of Spain?", "output": "Paris, and Madrid."})";
  Write(row + "\n" + row + "\n" + row + "\n");
  const auto text = HeldOutText({.held_out_tokens = 10, .sequence_length = 7}, *tokenizer_.get(), context_);
  ASSERT_THAT(text, IsOk());
  ASSERT_EQ(text->ids.size(), 2u);
  for (const auto& ids : text->ids) EXPECT_EQ(ids.size(), 7u);
  EXPECT_TRUE(HeldOutText({.held_out_tokens = 0, .sequence_length = 7}, *tokenizer_.get(), context_)->ids.empty());
}

// Goal: a bound without anything to measure it on is refused with the settings that help; without a bound it is not.
TEST_F(HeldOutTextTest, ABoundNeedsText) {
  const auto refused = StatusIs(absl::StatusCode::kFailedPrecondition, AllOf(HasSubstr("no held-out text"), HasSubstr("data.curate.held_out_fraction")));
  EXPECT_THAT(HeldOutText({.max_kl = 1, .held_out_tokens = 10, .sequence_length = 7}, *tokenizer_.get(), context_), refused);
  EXPECT_THAT(HeldOutText({.held_out_tokens = 10, .sequence_length = 7}, *tokenizer_.get(), context_), IsOk());
  Write("");
  EXPECT_THAT(HeldOutText({.max_ppl_ratio = 2, .held_out_tokens = 10, .sequence_length = 7}, *tokenizer_.get(), context_), refused);
}

}  // namespace
}  // namespace refinery::task
