#include "worker/task/runtime/torch.h"

#include "worker/task/train/trainer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>

#include "tests/support/status_matchers.h"
#include "tests/support/vectors.h"
#include "tests/worker/task/train/fixture.h"
#include "worker/task/train/diagnose.h"

namespace refinery::train {
namespace {

using ::refinery::testing::IsOk;
using ::refinery::testing::MaxDifference;
using ::refinery::testing::StatusIs;
using ::testing::HasSubstr;

StatusOr<TrainResult> TrainOnce(const TinyRun& run, runtime::Reporter* reporter = nullptr) {
  runtime::NullReporter silent;
  return Train(run.inputs, run.settings, {}, reporter == nullptr ? silent : *reporter);
}

struct DenseLosses {
  double kl = 0, cross_entropy = 0;
};

// Mean KL(teacher || student) at temperature 1 and cross-entropy over all answer tokens: dense softmaxes in float64,
// every sequence by itself.
DenseLosses Dense(const model::CausalLm& student, const model::CausalLm& teacher,
                  const std::vector<data::EncodedExample>& examples) {
  DenseLosses sums;
  double tokens = 0;
  for (const data::EncodedExample& example : examples) {
    const at::Tensor q = AnswerLogits(student, example).to(at::kDouble).log_softmax(1);
    const at::Tensor p = AnswerLogits(teacher, example).to(at::kDouble).log_softmax(1);
    sums.kl += (p.exp() * (p - q)).sum().item<double>();
    for (int64_t i = 0; i < q.size(0); ++i) {
      sums.cross_entropy -= q[i][example.tokens[static_cast<size_t>(example.answer_begin + i)]].item<double>();
    }
    tokens += static_cast<double>(q.size(0));
  }
  return {sums.kl / tokens, sums.cross_entropy / tokens};
}

// Goal: the right positions predict the right tokens, and packing changes nothing. Method: the first step's losses
// (factors are still without effect) over the whole data set, against dense losses of each sequence alone. K = V: the
// KL is exact.
TEST(TrainTest, FirstStepReportsTheUntouchedStudentsLoss) {
  TinyRun run(kTinyVocabulary);
  run.settings.steps = 1;
  run.settings.tokens_per_step = 0;
  for (const data::EncodedExample& example : run.inputs.train) {
    run.settings.tokens_per_step += static_cast<int64_t>(example.tokens.size());
  }
  run.settings.kl_weight = 0.25;
  const auto result = TrainOnce(run);
  ASSERT_THAT(result, IsOk());
  const DenseLosses wanted = Dense(*run.student, *run.teacher, run.inputs.train);
  ASSERT_EQ(result->curve.size(), 1u);
  EXPECT_NEAR(result->curve[0].kl, wanted.kl, 1e-5);
  EXPECT_NEAR(result->curve[0].cross_entropy, wanted.cross_entropy, 1e-5);
  EXPECT_NEAR(result->curve[0].loss, 0.25 * wanted.kl + 0.75 * wanted.cross_entropy, 1e-5);
  EXPECT_EQ(result->curve[0].tokens, static_cast<uint64_t>(run.settings.tokens_per_step));
}

// Goal: the adapter that comes out is the one whose loss is reported. Method: attach it, dense losses again; and the
// teacher has come much nearer on the examples that were trained.
TEST(TrainTest, LearnsTheTeacherWithBothOptimizers) {
  for (const OptimizerKind optimizer : {OptimizerKind::kMuon, OptimizerKind::kAdamW}) {
    TinyRun run(kTinyVocabulary);
    run.settings.optimizer = optimizer;
    run.settings.steps = 60;
    const double before = Dense(*run.student, *run.teacher, run.inputs.train).kl;
    const auto result = TrainOnce(run);
    ASSERT_THAT(result, IsOk());
    ASSERT_THAT(run.student->AttachAdapter(result->adapter), IsOk());
    const double after = Dense(*run.student, *run.teacher, run.inputs.train).kl;
    EXPECT_LT(after, 0.3 * before);
    ASSERT_TRUE(result->validation_loss.has_value());
    EXPECT_NEAR(*result->validation_loss, Dense(*run.student, *run.teacher, run.inputs.validation).kl, 1e-4);
  }
}

// Goal: validation losses of different trials can be compared. Method: with a rate too small to matter they are the
// same number, the dense KL, whatever the training loss is.
TEST(TrainTest, ValidationLossDoesNotDependOnTheTrainingLoss) {
  for (const auto& [kl_weight, temperature] : {std::pair(1.0, 1.0), std::pair(1.0, 4.0), std::pair(0.1, 2.0)}) {
    TinyRun run(kTinyVocabulary);
    run.settings.steps = 1;
    run.settings.learning_rate = 1e-12;
    run.settings.kl_weight = kl_weight;
    run.settings.temperature = temperature;
    const auto result = TrainOnce(run);
    ASSERT_THAT(result, IsOk());
    EXPECT_NEAR(*result->validation_loss, Dense(*run.student, *run.teacher, run.inputs.validation).kl, 1e-5);
  }
}

TEST(TrainTest, TrainsOnCrossEntropyWithoutATeacher) {
  TinyRun run;
  run.inputs.teacher = nullptr;
  run.settings.kl_weight = 0;
  run.settings.steps = 60;
  const auto result = TrainOnce(run);
  ASSERT_THAT(result, IsOk());
  EXPECT_LT(result->curve.back().loss, 0.5 * result->curve.front().loss);
  ASSERT_THAT(run.student->AttachAdapter(result->adapter), IsOk());
  EXPECT_NEAR(*result->validation_loss, Dense(*run.student, *run.teacher, run.inputs.validation).cross_entropy, 1e-4);
}

TEST(TrainTest, SameSeedGivesTheSameBitsAndAnotherDoesNot) {
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    TinyRun run(24, dtype);
    const auto first = TrainOnce(run);
    const auto second = TrainOnce(run);
    ++run.inputs.seed;
    const auto other = TrainOnce(run);
    ASSERT_THAT(first, IsOk());
    ASSERT_THAT(second, IsOk());
    ASSERT_THAT(other, IsOk());
    EXPECT_TRUE(SameBits(first->adapter, second->adapter));
    EXPECT_FALSE(SameBits(first->adapter, other->adapter));
  }
}

// Goal: micro-batches change memory, not results. Method: four steps at once and in parts; every part weighed by its
// own tokens instead of the step's would show in the losses, a lost or doubled part in the factors.
TEST(TrainTest, MicroBatchesGiveTheSameTraining) {
  TinyRun run;
  run.settings.steps = 4;
  const auto whole = TrainOnce(run);
  run.settings.micro_batch_tokens = 15;
  const auto parts = TrainOnce(run);
  ASSERT_THAT(whole, IsOk());
  ASSERT_THAT(parts, IsOk());
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_NEAR(parts->curve[i].loss, whole->curve[i].loss, 1e-4);
    EXPECT_EQ(parts->curve[i].tokens, whole->curve[i].tokens);
  }
  for (const auto& [module, pair] : whole->adapter.pairs) {
    EXPECT_LT(MaxDifference(parts->adapter.pairs.at(module).b, pair.b), 2e-3) << module;
  }
}

TEST(TrainTest, ReportsEveryStep) {
  TinyRun run;
  RecordingReporter reporter;
  const auto result = TrainOnce(run, &reporter);
  ASSERT_THAT(result, IsOk());
  ASSERT_EQ(reporter.reports.size(), 6u);
  EXPECT_EQ(reporter.reports.back().done, 6);
  EXPECT_EQ(reporter.reports.back().total, 6);
  EXPECT_EQ(reporter.reports.back().tokens_trained, result->curve.back().tokens);
  EXPECT_EQ(reporter.reports.back().loss, result->curve.back().loss);
  EXPECT_GT(reporter.reports.back().tokens_per_second, 0);
}

TEST(TrainTest, GivesTheStudentBackWhenCancelled) {
  TinyRun run;
  RecordingReporter reporter;
  reporter.cancel_at = 2;
  EXPECT_THROW((void)TrainOnce(run, &reporter), runtime::CancelledException);
  EXPECT_EQ(reporter.reports.size(), 2u);
  for (model::DecoderLayer& layer : run.student->layers) {
    for (const model::Linear* linear : layer.Linears()) EXPECT_FALSE(linear->lora_a.defined());
  }
}

// Goal: a diverged run names step and layer. Method: a weight of the second layer is not a number.
TEST(TrainTest, NamesTheLayerWhereTheLossStoppedBeingFinite) {
  TinyRun run;
  run.student->layers[1].gate.weight[0][0] = std::numeric_limits<float>::quiet_NaN();
  try {
    (void)TrainOnce(run);
    FAIL() << "a NaN went unnoticed";
  } catch (const runtime::NumericException& exception) {
    EXPECT_THAT(exception.what(), HasSubstr("step 1"));
    EXPECT_THAT(exception.what(), HasSubstr("model.layers.1"));
  }
}

TEST(TrainTest, NamesTheLastLayerOfANonFiniteGradientFirst) {
  std::vector<optim::Parameter> parameters;
  for (const char* name : {"a", "b", "c"}) {
    parameters.push_back({name, at::zeros({2}).requires_grad_(true)});
    parameters.back().value.mutable_grad() = at::zeros({2});
  }
  parameters[0].value.mutable_grad()[1] = std::numeric_limits<float>::infinity();
  parameters[1].value.mutable_grad()[0] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(FirstNonFiniteGradient(parameters), "b");
}

TEST(TrainTest, RefusesSettingsThatCannotWork) {
  const auto refused = [](const std::function<void(TrainSettings&)>& change, const char* message) {
    TinyRun run;
    change(run.settings);
    EXPECT_THAT(TrainOnce(run), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
  };
  refused([](TrainSettings& s) { s.learning_rate = 0; }, "learning_rate must be > 0");
  refused([](TrainSettings& s) { s.temperature = -1; }, "temperature must be in [0.5, 8], is -1");
  refused([](TrainSettings& s) { s.temperature = 0.49; }, "temperature must be in [0.5, 8], is 0.49");
  refused([](TrainSettings& s) { s.temperature = 8.1; }, "temperature must be in [0.5, 8], is 8.1");
  refused([](TrainSettings& s) { s.kl_weight = 1.5; }, "kl_weight must be in [0, 1]");
  refused([](TrainSettings& s) { s.lora_rank = 0; }, "lora_rank");
  refused([](TrainSettings& s) { s.steps = 0; }, "steps");
  refused([](TrainSettings& s) { s.tokens_per_step = 0; }, "tokens_per_step");
  refused([](TrainSettings& s) { s.momentum = 1; }, "momentum");
}

TEST(TrainTest, RefusesExamplesThatCannotBeTrained) {
  const auto refused = [](const std::function<void(TinyRun&)>& change, absl::StatusCode code, const char* message) {
    TinyRun run;
    change(run);
    EXPECT_THAT(TrainOnce(run), StatusIs(code, HasSubstr(message)));
  };
  using enum absl::StatusCode;
  refused([](TinyRun& run) { run.inputs.train.clear(); }, kInvalidArgument, "no training examples");
  refused([](TinyRun& run) { run.inputs.train[3].answer_begin = 0; }, kInvalidArgument, "training example 4 (train/3)");
  refused([](TinyRun& run) { run.inputs.train[3].tokens[1] = kTinyVocabulary; }, kInvalidArgument, "vocabulary of 96");
  refused([](TinyRun& run) { run.inputs.validation[0].tokens.resize(100); }, kInvalidArgument, "student takes 64");
  refused([](TinyRun& run) { run.inputs.train[3].key = "new"; }, kNotFound, "new");
  refused([](TinyRun& run) { run.inputs.train[3].tokens.push_back(1); }, kDataLoss, "train/3");
  refused([](TinyRun& run) { run.inputs.teacher = nullptr; }, kInvalidArgument, "no teacher logits");
}

}  // namespace
}  // namespace refinery::train
