#include "worker/task/runtime/torch.h"

#include "worker/task/recover/recover.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/status_matchers.h"
#include "tests/worker/task/recover/fixture.h"
#include "worker/task/quantize/quantized_artifact.h"

namespace refinery::recover {
namespace {

using refinery::testing::IsOk;
using refinery::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

struct Task {
  std::shared_ptr<model::CausalLm> source = Source();
  quantize::QuantizedModel quantized = Rounded();
  RecoverInputs inputs;
  RecoverSettings settings{.steps = 12, .tokens_per_step = 200, .learning_rate = 2e-2, .evaluate_every = 3};

  Task() {
    inputs.source = source.get();
    inputs.train = refinery::testing::TinyCalibration(40);
    inputs.validation.assign(inputs.train.end() - 10, inputs.train.end());
    inputs.train.resize(30);
    inputs.seed = 3;
  }
};

bool SameBits(const quantize::QuantizedModel& a, const quantize::QuantizedModel& b) {
  if (a.linears.size() != b.linears.size()) return false;
  for (const auto& [module, linear] : a.linears) {
    const quantize::QuantizedLinear& other = b.linears.at(module);
    if (!at::equal(linear.codes, other.codes) || !at::equal(linear.scales, other.scales)) return false;
  }
  if (a.norms.size() != b.norms.size()) return false;
  for (const auto& [name, norm] : a.norms)
    if (!at::equal(norm, b.norms.at(name))) return false;
  return true;
}

// KL of the validation sequences in double, from plain models.
double ValidationKl(const Task& task) {
  const auto source = Source(), plain = Source();
  EXPECT_THAT(quantize::ApplyQuantized(*plain, task.quantized), IsOk());
  double sum = 0, tokens = 0;
  for (const std::vector<int32_t>& sequence : task.inputs.validation) {
    const at::Tensor ids = at::tensor(std::vector<int64_t>(sequence.begin(), sequence.end()), at::kLong);
    const model::PackedBatch batch{.token_ids = ids, .lengths = {ids.size(0)}};
    const at::Tensor log_p = source->Logits(source->Hidden(batch)).to(at::kDouble).log_softmax(1);
    const at::Tensor log_q = plain->Logits(plain->Hidden(batch)).to(at::kDouble).log_softmax(1);
    sum += (log_p.exp() * (log_p - log_q)).sum().item<double>();
    tokens += static_cast<double>(ids.size(0));
  }
  return sum / tokens;
}

// Goal: the KL falls, only the scales change, and what is reported is what was stored.
TEST(RecoverTest, LowersTheKlAndKeepsTheFormat) {
  Task task;
  const quantize::QuantizedModel before = task.quantized;
  const double kl_before = ValidationKl(task);
  runtime::NullReporter reporter;
  const auto result = Recover(task.inputs, task.settings, {}, reporter, &task.quantized);
  ASSERT_THAT(result, IsOk());
  EXPECT_NEAR(result->kl_before, kl_before, 1e-5 * kl_before);
  EXPECT_NEAR(result->kl_after, ValidationKl(task), 1e-5 * kl_before);
  EXPECT_LT(result->kl_after, 0.97 * result->kl_before);
  EXPECT_EQ(result->steps, 12);
  EXPECT_EQ(result->curve.size(), 5u);  // before, and after 3, 6, 9 and 12 steps
  int64_t changed = 0;
  for (const auto& [module, linear] : task.quantized.linears) {
    const quantize::QuantizedLinear& old = before.linears.at(module);
    EXPECT_TRUE(at::equal(linear.codes, old.codes)) << module;
    EXPECT_EQ(linear.scales.scalar_type(), at::kHalf);
    EXPECT_EQ(linear.scales.sizes(), old.scales.sizes());
    EXPECT_TRUE(at::isfinite(linear.scales).all().item<bool>());
    EXPECT_TRUE(at::equal(linear.scales > 0, old.scales > 0)) << module;
    changed += (linear.scales != old.scales).sum().item<int64_t>();
  }
  EXPECT_GT(changed, 100);
  // The same bytes as before but for the scales: it can be stored and read.
  const auto folder = FreshFolder("recovered");
  ASSERT_THAT(quantize::SaveQuantized(task.quantized, folder), IsOk());
  auto back = quantize::LoadQuantized(folder);
  ASSERT_THAT(back, IsOk());
  EXPECT_TRUE(SameBits(*back, task.quantized));
  EXPECT_EQ(back->norms.size(), 5u);
  EXPECT_EQ(back->recovery, task.quantized.recovery);
  EXPECT_EQ(back->recovery.at("steps"), result->best_step);
  // A norm of another model is refused, and so is what was recovered already.
  quantize::QuantizedModel other = *back;
  other.norms["model.layers.7.input_layernorm.weight"] = at::ones({64});
  EXPECT_THAT(quantize::ApplyQuantized(*Source(), other), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("layers.7")));
  EXPECT_THAT(Recover(task.inputs, task.settings, {}, reporter, &*back).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("recovered already")));
  std::filesystem::remove(folder / "norms.safetensors");
  EXPECT_THAT(quantize::LoadQuantized(folder).status(), StatusIs(absl::StatusCode::kNotFound, HasSubstr("norms.safetensors")));
}

// Goal: what got worse is not kept.  Method: a rate that ruins the model at once, and patience.
TEST(RecoverTest, NeverReturnsSomethingWorseAndStopsEarly) {
  Task task;
  task.settings.learning_rate = 0.1;
  task.settings.warmup_fraction = 0;
  task.settings.steps = 100;
  task.settings.evaluate_every = 2;
  task.settings.patience = 2;
  // Validation text that the source itself quantized best: the artifact of 8 bits has next to nothing to recover.
  task.quantized = quantize::RoundModelToNearest(*Source(), {.bits = 8, .group_size = 16});
  const quantize::QuantizedModel before = task.quantized;
  RecordingReporter reporter;
  const auto result = Recover(task.inputs, task.settings, {}, reporter, &task.quantized);
  ASSERT_THAT(result, IsOk());
  EXPECT_TRUE(result->stopped_early);
  EXPECT_EQ(result->steps, 4);
  EXPECT_EQ(result->best_step, 0);
  EXPECT_EQ(result->kl_after, result->kl_before);
  EXPECT_TRUE(SameBits(task.quantized, before));
  EXPECT_THAT(reporter.notes, ElementsAre("recover_kept"));
}

TEST(RecoverTest, WithoutPatienceItRunsToItsEnd) {
  Task task;
  task.settings.learning_rate = 0.1;
  task.settings.steps = 10;
  task.settings.evaluate_every = 1;
  task.settings.patience = 0;
  task.quantized = quantize::RoundModelToNearest(*Source(), {.bits = 8, .group_size = 16});
  runtime::NullReporter reporter;
  const auto result = Recover(task.inputs, task.settings, {}, reporter, &task.quantized);
  ASSERT_THAT(result, IsOk());
  EXPECT_EQ(result->steps, 10);
  EXPECT_FALSE(result->stopped_early);
}

// Goal: an interrupted run gives the same bits.  Method: cancelled at every step in turn, resumed from the newest checkpoint
// (made in other places than the measurements).
TEST(RecoverTest, ResumedRunsGiveTheSameBits) {
  Task whole;
  whole.settings.checkpoint_every = 2;
  runtime::NullReporter quiet;
  const auto wanted = Recover(whole.inputs, whole.settings, {}, quiet, &whole.quantized);
  ASSERT_THAT(wanted, IsOk());
  for (const int cancel_after : {2, 5, 9}) {
    const auto folder = FreshFolder("resume");
    Task task;
    task.settings.checkpoint_every = 2;
    RecordingReporter reporter;
    reporter.cancel_after = cancel_after;
    EXPECT_THROW((void)Recover(task.inputs, task.settings, {.folder = folder}, reporter, &task.quantized),
                 runtime::CancelledException);
    ASSERT_FALSE(reporter.checkpoints.empty());
    const auto result =
        Recover(task.inputs, task.settings, {.folder = folder, .resume = folder / reporter.checkpoints.back()}, quiet, &task.quantized);
    ASSERT_THAT(result, IsOk());
    EXPECT_TRUE(SameBits(task.quantized, whole.quantized)) << "cancelled after " << cancel_after;
    EXPECT_EQ(result->kl_after, wanted->kl_after);
    EXPECT_EQ(result->best_step, wanted->best_step);
    EXPECT_EQ(result->tokens, wanted->tokens);
    ASSERT_EQ(result->curve.size(), wanted->curve.size());
    for (size_t i = 0; i < result->curve.size(); ++i) EXPECT_EQ(result->curve[i].kl, wanted->curve[i].kl);
  }
}

TEST(RecoverTest, ACheckpointOfAnotherArtifactIsRefused) {
  const auto folder = FreshFolder("resume");
  Task task;
  task.settings.checkpoint_every = 4;
  RecordingReporter reporter;
  ASSERT_THAT(Recover(task.inputs, task.settings, {.folder = folder}, reporter, &task.quantized), IsOk());
  EXPECT_THAT(reporter.checkpoints, ElementsAre("step-000004", "step-000008"));
  task.quantized = Rounded();
  task.quantized.linears.at("model.layers.0.mlp.up_proj").scales.mul_(1.5);
  EXPECT_THAT(Recover(task.inputs, task.settings, {.resume = folder / "step-000008"}, reporter, &task.quantized).status(),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("'scales'")));
}

TEST(RecoverTest, TheSameSeedGivesTheSameBitsAndAnotherOneOthers) {
  Task a, b, c;
  c.inputs.seed = 4;
  runtime::NullReporter reporter;
  for (Task* task : {&a, &b, &c}) ASSERT_THAT(Recover(task->inputs, task->settings, {}, reporter, &task->quantized), IsOk());
  EXPECT_TRUE(SameBits(a.quantized, b.quantized));
  EXPECT_FALSE(SameBits(a.quantized, c.quantized));
}

TEST(RecoverTest, BadInputsAreNamed) {
  runtime::NullReporter reporter;
  const auto status = [&](const auto& change) {
    Task task;
    change(&task);
    return Recover(task.inputs, task.settings, {}, reporter, &task.quantized).status();
  };
  const auto invalid = [](const char* text) { return StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(text)); };
  EXPECT_THAT(status([](Task* t) { t->inputs.train.clear(); }), invalid("at least one training sequence"));
  EXPECT_THAT(status([](Task* t) { t->inputs.validation.clear(); }), invalid("at least one validation sequence"));
  EXPECT_THAT(status([](Task* t) { t->inputs.train[2].clear(); }), invalid("training sequence 3 is empty"));
  EXPECT_THAT(status([](Task* t) { t->inputs.validation[1][0] = 80; }), invalid("token id 80"));
  EXPECT_THAT(status([](Task* t) { t->inputs.train[0].resize(300); }), invalid("has 300 tokens, the model takes 256"));
  EXPECT_THAT(status([](Task* t) { t->settings.steps = 0; }), invalid("recover.steps"));
  EXPECT_THAT(status([](Task* t) { t->settings.learning_rate = 1; }), invalid("recover.learning_rate"));
  EXPECT_THAT(status([](Task* t) { t->settings.layer_weight = -1; }), invalid("recover.layer_weight"));
  EXPECT_THAT(status([](Task* t) { t->settings.evaluate_every = 0; }), invalid("recover.evaluate_every"));
  EXPECT_THAT(status([](Task* t) { t->quantized.linears.clear(); }), invalid("made from another model"));
}

TEST(RecoverTest, ANonFiniteModelIsNamed) {
  Task task;
  task.quantized.linears.at("model.layers.0.mlp.up_proj").scales[3][1] = std::numeric_limits<double>::quiet_NaN();
  runtime::NullReporter reporter;
  EXPECT_THROW((void)Recover(task.inputs, task.settings, {}, reporter, &task.quantized), runtime::NumericException);
}

}  // namespace
}  // namespace refinery::recover
