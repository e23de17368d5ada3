#include "worker/task/train/curve.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/files.h"
#include "tests/support/status_matchers.h"
#include "tests/worker/task/train/fixture.h"

namespace refinery::train {
namespace {

using ::refinery::testing::IsOk;
using ::refinery::testing::StatusIs;
using ::testing::HasSubstr;

TEST(CurveTest, ReturnsTheSameBits) {
  const std::filesystem::path path = FreshFolder("curve") / "curve.jsonl";
  const std::vector<CurvePoint> curve = {{.step = 1,
                                          .loss = 1.0 / 3,
                                          .kl = 1e-17,
                                          .cross_entropy = 2.5,
                                          .learning_rate = 2e-3 / 7,
                                          .tokens = 500,
                                          .seconds = 0.1},
                                         {.step = 2, .loss = 0.3, .tokens = 1 << 30, .validation_loss = 0.1 + 0.2}};
  ASSERT_THAT(WriteCurve(curve, path), IsOk());
  const auto read = ReadCurve(path);
  ASSERT_THAT(read, IsOk());
  ASSERT_EQ(read->size(), 2u);
  for (size_t i = 0; i < 2; ++i) {
    EXPECT_EQ((*read)[i].step, curve[i].step);
    EXPECT_EQ((*read)[i].loss, curve[i].loss);
    EXPECT_EQ((*read)[i].kl, curve[i].kl);
    EXPECT_EQ((*read)[i].cross_entropy, curve[i].cross_entropy);
    EXPECT_EQ((*read)[i].learning_rate, curve[i].learning_rate);
    EXPECT_EQ((*read)[i].tokens, curve[i].tokens);
    EXPECT_EQ((*read)[i].seconds, curve[i].seconds);
    EXPECT_EQ((*read)[i].validation_loss, curve[i].validation_loss);
  }
}

TEST(CurveTest, NamesTheDamagedLine) {
  const std::filesystem::path path = FreshFolder("curve") / "curve.jsonl";
  ASSERT_THAT(WriteCurve({{.step = 1}}, path), IsOk());
  ASSERT_THAT(WriteFileAtomically(path, *ReadFile(path) + "{\"step\": 2}\n"), IsOk());
  EXPECT_THAT(ReadCurve(path), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("curve.jsonl:2")));
}

}  // namespace
}  // namespace refinery::train
