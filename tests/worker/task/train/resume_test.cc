#include "worker/task/runtime/torch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "common/files.h"
#include "tests/support/status_matchers.h"
#include "tests/worker/task/train/fixture.h"
#include "worker/task/train/trainer.h"
#include "worker/task/train/training_state.h"

namespace refinery::train {
namespace {

using ::refinery::testing::IsOk;
using ::refinery::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;

// Goal: an interrupted training ends with the bits of an undisturbed one. Method: six steps at once against three,
// killed, and three more from the checkpoint by a program that has only the folder; both optimizers, bfloat16
// student.
TEST(ResumeTest, GivesTheBitsOfAnUndisturbedRun) {
  for (const OptimizerKind optimizer : {OptimizerKind::kMuon, OptimizerKind::kAdamW}) {
    TinyRun straight(24, at::kBFloat16);
    straight.settings.optimizer = optimizer;
    straight.settings.weight_decay = 0.01;
    straight.settings.checkpoint_every = 3;
    runtime::NullReporter silent;
    const auto whole = Train(straight.inputs, straight.settings, {.folder = FreshFolder("whole")}, silent);
    ASSERT_THAT(whole, IsOk());

    TinyRun first(24, at::kBFloat16);
    first.settings = straight.settings;
    const std::filesystem::path folder = FreshFolder("halves");
    RecordingReporter killed;
    killed.cancel_at = 4;
    EXPECT_THROW((void)Train(first.inputs, first.settings, {.folder = folder}, killed), runtime::CancelledException);
    EXPECT_THAT(killed.checkpoints, ElementsAre(Pair("step-000003", 3)));

    TinyRun second(24, at::kBFloat16);
    second.settings = straight.settings;
    RecordingReporter reporter;
    const auto rest =
        Train(second.inputs, second.settings, {.folder = folder, .resume = folder / "step-000003"}, reporter);
    ASSERT_THAT(rest, IsOk());
    EXPECT_EQ(reporter.reports.size(), 3u);
    EXPECT_TRUE(SameBits(whole->adapter, rest->adapter));
    ASSERT_EQ(rest->curve.size(), whole->curve.size());
    for (size_t i = 0; i < whole->curve.size(); ++i) {
      EXPECT_EQ(rest->curve[i].step, whole->curve[i].step);
      EXPECT_EQ(rest->curve[i].loss, whole->curve[i].loss);
      EXPECT_EQ(rest->curve[i].tokens, whole->curve[i].tokens);
      EXPECT_EQ(rest->curve[i].validation_loss, whole->curve[i].validation_loss);
    }
    EXPECT_GT(rest->curve[3].seconds, rest->curve[2].seconds);
  }
}

class CheckpointTest : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = FreshFolder("checkpoints");
    run_.settings.checkpoint_every = 3;
    runtime::NullReporter silent;
    ASSERT_THAT(Train(run_.inputs, run_.settings, {.folder = folder_}, silent), IsOk());
    checkpoint_ = folder_ / "step-000003";
  }
  StatusOr<TrainResult> Resume() {
    runtime::NullReporter silent;
    return Train(run_.inputs, run_.settings, {.resume = checkpoint_}, silent);
  }
  void Replace(const std::string& name, const std::string& from, const std::string& to) {
    std::string text = *ReadFile(checkpoint_ / name);
    const size_t place = text.find(from);
    ASSERT_NE(place, std::string::npos);
    text.replace(place, from.size(), to);
    ASSERT_THAT(WriteFileAtomically(checkpoint_ / name, text), IsOk());
  }

  TinyRun run_;
  std::filesystem::path folder_, checkpoint_;
};

TEST_F(CheckpointTest, LeavesNothingElseBehind) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder_)) names.push_back(entry.path().filename());
  EXPECT_THAT(names, ElementsAre("step-000003"));
}

TEST_F(CheckpointTest, RefusesARunWithOtherSettings) {
  run_.settings.temperature = 3;
  EXPECT_THAT(Resume(),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("'temperature' is 1.0 there, 3.0 here")));
}

TEST_F(CheckpointTest, RefusesARunWithOtherData) {
  std::swap(run_.inputs.train[0], run_.inputs.train[1]);
  EXPECT_THAT(Resume(), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("'train_examples'")));
}

TEST_F(CheckpointTest, RefusesDamagedFiles) {
  std::string bytes = *ReadFile(checkpoint_ / "optimizer.safetensors");
  bytes.back() = static_cast<char>(bytes.back() ^ 1);
  ASSERT_THAT(WriteFileAtomically(checkpoint_ / "optimizer.safetensors", bytes), IsOk());
  EXPECT_THAT(Resume(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("optimizer.safetensors")));
}

TEST_F(CheckpointTest, RefusesAStateThatContradictsItself) {
  Replace("state.json", "\"step\": 3", "\"step\": 2");
  EXPECT_THAT(Resume(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("contradict")));
  Replace("state.json", "\"step\": 2", "\"step\": -3");
  EXPECT_THAT(Resume(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("'step'")));
  Replace("state.json", "{", "[");
  EXPECT_THAT(Resume(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("state.json")));
}

TEST_F(CheckpointTest, NamesAMissingFolder) {
  checkpoint_ = folder_ / "step-000009";
  EXPECT_THAT(Resume(), StatusIs(absl::StatusCode::kNotFound, HasSubstr("step-000009")));
}

// A run that had to be cut into smaller micro-batches after running out of memory may still resume.
TEST_F(CheckpointTest, AcceptsOtherMicroBatches) {
  run_.settings.micro_batch_tokens = 12;
  EXPECT_THAT(Resume(), IsOk());
}

}  // namespace
}  // namespace refinery::train
