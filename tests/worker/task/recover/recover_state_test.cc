#include "worker/task/runtime/torch.h"

#include "worker/task/recover/recover_state.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>

#include "common/files.h"
#include "tests/support/status_matchers.h"
#include "tests/worker/task/recover/fixture.h"

namespace refinery::recover {
namespace {

using refinery::testing::IsOk;
using refinery::testing::StatusIs;
using ::testing::HasSubstr;

RecoverState Example() {
  at::manual_seed(1);
  return {.step = 12,
          .cursor = {.epoch = 1, .position = 3},
          .tokens = 4096,
          .curve = {{0, 0.25}, {8, 0.1 + 0.2}},
          .best_step = 8,
          .best_kl = 0.1 + 0.2,
          .fingerprint = {{"seed", 7}, {"learning_rate", 0.002}},
          .tensors = {{"value/a", at::randn({3, 2})}, {"best/a", at::randn({3, 2})}, {"optimizer/a.step", at::full({}, 12, at::kLong)}}};
}

TEST(RecoverStateTest, ComesBackAsItWas) {
  const auto folder = FreshFolder("state");
  const RecoverState state = Example();
  ASSERT_THAT(SaveRecoverState(state, folder), IsOk());
  const auto back = LoadRecoverState(folder / "step-000012", state.fingerprint);
  ASSERT_THAT(back, IsOk());
  EXPECT_EQ(back->step, 12);
  EXPECT_EQ(back->cursor.epoch, 1);
  EXPECT_EQ(back->cursor.position, 3);
  EXPECT_EQ(back->tokens, 4096u);
  EXPECT_EQ(back->best_step, 8);
  EXPECT_EQ(back->best_kl, 0.1 + 0.2);  // the same bits
  ASSERT_EQ(back->curve.size(), 2u);
  EXPECT_EQ(back->curve[1].kl, 0.1 + 0.2);
  ASSERT_EQ(back->tensors.size(), 3u);
  for (const auto& [name, tensor] : state.tensors) EXPECT_TRUE(at::equal(back->tensors.at(name), tensor)) << name;
}

TEST(RecoverStateTest, AnotherRunsCheckpointIsRefusedByName) {
  const auto folder = FreshFolder("state");
  ASSERT_THAT(SaveRecoverState(Example(), folder), IsOk());
  EXPECT_THAT(LoadRecoverState(folder / "step-000012", {{"seed", 7}, {"learning_rate", 0.003}}).status(),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("'learning_rate' is 0.002 there, 0.003 here")));
}

// Goal: no damage passes.  Method: each file cut, changed by a byte, or with a field of the wrong kind.
TEST(RecoverStateTest, DamagedFilesAreNamed) {
  const RecoverState state = Example();
  const auto damaged = [&](const std::string& file, const auto& damage) {
    const auto folder = FreshFolder("state");
    EXPECT_THAT(SaveRecoverState(state, folder), IsOk());
    const auto path = folder / "step-000012" / file;
    std::string bytes = *ReadFile(path);
    damage(&bytes);
    std::ofstream(path, std::ios::binary) << bytes;
    return LoadRecoverState(folder / "step-000012", state.fingerprint).status();
  };
  EXPECT_THAT(damaged("values.safetensors", [](std::string* b) { b->back() ^= 1; }),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("values.safetensors")));
  EXPECT_THAT(damaged("state.json", [](std::string* b) { b->resize(b->size() / 2); }),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("state.json")));
  const auto replace = [](const char* from, const char* to) {
    return [=](std::string* b) { b->replace(b->find(from), std::string(from).size(), to); };
  };
  EXPECT_THAT(damaged("state.json", replace("\"step\": 12", "\"step\": \"x\"")), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("state.json")));
  EXPECT_THAT(damaged("state.json", replace("\"best_step\": 8", "\"best_step\": 99")), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("state.json")));
  EXPECT_THAT(damaged("state.json", replace("\"version\": 1", "\"version\": 2")), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("state.json")));
}

}  // namespace
}  // namespace refinery::recover
