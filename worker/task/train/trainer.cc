#include "worker/task/runtime/torch.h"

#include "worker/task/train/trainer.h"

#include <chrono>
#include <cmath>
#include <memory>
#include <utility>

#include "common/digest.h"
#include "worker/task/distill/kd_loss.h"
#include "worker/task/optim/adamw.h"
#include "worker/task/optim/muon.h"
#include "worker/task/optim/schedule.h"
#include "worker/task/train/batches.h"
#include "worker/task/train/diagnose.h"
#include "worker/task/train/lora.h"
#include "worker/task/train/prepare.h"
#include "worker/task/train/training_state.h"

namespace refinery::train {
namespace {

using Clock = std::chrono::steady_clock;

std::unique_ptr<optim::Optimizer> MakeOptimizer(const std::vector<optim::Parameter>& parameters,
                                                const TrainSettings& settings) {
  if (settings.optimizer == OptimizerKind::kMuon) {
    return std::make_unique<optim::Muon>(
        parameters, optim::MuonSettings{.momentum = settings.momentum, .weight_decay = settings.weight_decay});
  }
  return std::make_unique<optim::AdamW>(
      parameters,
      optim::AdamWSettings{.beta1 = settings.beta1, .beta2 = settings.beta2, .weight_decay = settings.weight_decay});
}

// KL and cross-entropy per answer token of one optimizer step or of the validation examples.
struct Losses {
  double kl = 0;
  double cross_entropy = 0;
};

class Trainer {
 public:
  Trainer(const TrainInputs& inputs, const TrainSettings& settings, const CheckpointPaths& paths,
          runtime::Reporter& reporter, TeacherTables teacher)
      : inputs_(inputs),
        settings_(settings),
        paths_(paths),
        reporter_(reporter),
        teacher_(std::move(teacher)),
        factors_(inputs.student, settings.lora_rank, settings.lora_alpha, inputs.seed),
        optimizer_(MakeOptimizer(factors_.parameters(), settings)),
        stream_(Lengths(inputs.train), inputs.seed),
        schedule_{
            .peak = settings.learning_rate, .steps = settings.steps, .warmup_fraction = settings.warmup_fraction} {}

  Status Resume();
  StatusOr<TrainResult> Run();

 private:
  Losses Step(double learning_rate, uint64_t* tokens);
  Losses ForwardBackward(const TrainBatch& batch, int64_t answer_tokens);
  std::optional<double> ValidationLoss() const;
  Status SaveCheckpoint();
  void Report(const CurvePoint& point, uint64_t step_tokens, double step_seconds);
  double Seconds() const { return seconds_before_ + std::chrono::duration<double>(Clock::now() - start_).count(); }

  const TrainInputs& inputs_;
  const TrainSettings& settings_;
  const CheckpointPaths& paths_;
  runtime::Reporter& reporter_;
  const TeacherTables teacher_;
  LoraFactors factors_;
  std::unique_ptr<optim::Optimizer> optimizer_;
  ExampleStream stream_;
  optim::Schedule schedule_;
  int64_t step_ = 0;  // updates made
  uint64_t tokens_ = 0;
  uint64_t tokens_this_attempt_ = 0;
  double seconds_before_ = 0;
  std::vector<CurvePoint> curve_;
  Clock::time_point start_ = Clock::now();
};

Status Trainer::Resume() {
  RF_ASSIGN_OR_RETURN(const TrainingState state, LoadTrainingState(paths_.resume, Fingerprint(inputs_, settings_)));
  RF_RETURN_IF_ERROR(Annotate(factors_.Load(state.adapter), paths_.resume.string()));
  const Status loaded = optimizer_->LoadState(state.optimizer);
  if (!loaded.ok()) return DataLoss(paths_.resume.string(), ": ", Message(loaded));
  const auto examples = static_cast<int64_t>(inputs_.train.size());
  if (state.step > settings_.steps || state.cursor.position >= examples ||
      static_cast<int64_t>(state.curve.size()) != state.step) {
    return DataLoss(paths_.resume.string(), ": step, place in the data and curve contradict each other");
  }
  stream_.Seek(state.cursor);
  step_ = state.step;
  tokens_ = state.tokens;
  curve_ = state.curve;
  if (!curve_.empty()) seconds_before_ = curve_.back().seconds;
  return absl::OkStatus();
}

StatusOr<TrainResult> Trainer::Run() {
  start_ = Clock::now();
  while (step_ < settings_.steps) {
    reporter_.Check();
    const double begin = Seconds();
    const double learning_rate = schedule_.At(step_);
    uint64_t step_tokens = 0;
    const Losses losses = Step(learning_rate, &step_tokens);
    ++step_;
    tokens_ += step_tokens;
    tokens_this_attempt_ += step_tokens;
    const double seconds = Seconds();
    const double scale = settings_.kl_weight * settings_.temperature * settings_.temperature;
    CurvePoint point{.step = step_,
                     .loss = scale * losses.kl + (1 - settings_.kl_weight) * losses.cross_entropy,
                     .kl = losses.kl,
                     .cross_entropy = losses.cross_entropy,
                     .learning_rate = learning_rate,
                     .tokens = tokens_,
                     .seconds = seconds};
    const bool last = step_ == settings_.steps;
    const bool checkpoint = settings_.checkpoint_every > 0 && step_ % settings_.checkpoint_every == 0 && !last &&
                            !paths_.folder.empty();
    if (last || checkpoint) point.validation_loss = ValidationLoss();
    curve_.push_back(point);
    Report(point, step_tokens, seconds - begin);
    if (checkpoint) RF_RETURN_IF_ERROR(SaveCheckpoint());
  }
  TrainResult result{.adapter = factors_.ToAdapter(inputs_.base_model), .curve = curve_};
  if (!curve_.empty()) result.validation_loss = curve_.back().validation_loss;
  return result;
}

Losses Trainer::Step(double learning_rate, uint64_t* tokens) {
  const std::vector<size_t> examples = stream_.Next(settings_.tokens_per_step);
  const int64_t answer_tokens = AnswerTokens(examples, inputs_.train);
  optim::ZeroGradients(factors_.parameters());
  Losses losses;
  for (const std::vector<size_t>& part : SplitByTokens(examples, inputs_.train, settings_.micro_batch_tokens)) {
    const TrainBatch batch = MakeBatch(part, inputs_.train, teacher_.train, inputs_.student->device());
    const Losses added = ForwardBackward(batch, answer_tokens);
    losses.kl += added.kl;
    losses.cross_entropy += added.cross_entropy;
    *tokens += static_cast<uint64_t>(batch.packed.token_ids.size(0));
  }
  const double norm = optim::ClipGradients(factors_.parameters(), settings_.clip_norm);
  if (!std::isfinite(norm)) {
    throw runtime::NumericException(Join("step ", step_ + 1, ": the gradient is not finite, first in ",
                                         FirstNonFiniteGradient(factors_.parameters())));
  }
  optimizer_->Step(learning_rate);
  return losses;
}

Losses Trainer::ForwardBackward(const TrainBatch& batch, int64_t answer_tokens) {
  const at::Tensor hidden = inputs_.student->Hidden(batch.packed).index_select(0, batch.positions);
  const distill::KdSettings kd{.kl_weight = settings_.kl_weight, .temperature = settings_.temperature};
  const distill::KdResult result =
      distill::KdLoss(hidden, inputs_.student->lm_head, batch.targets, batch.teacher, kd, answer_tokens);
  if (!std::isfinite(result.kl) || !std::isfinite(result.cross_entropy)) {
    throw runtime::NumericException(Join("step ", step_ + 1, ": the loss is not finite, first in ",
                                         FirstNonFiniteLayer(*inputs_.student, batch.packed)));
  }
  result.loss.backward();
  return {result.kl, result.cross_entropy};
}

std::optional<double> Trainer::ValidationLoss() const {
  const std::vector<size_t> examples = ValidationExamples(inputs_.validation, settings_.validation_tokens);
  if (examples.empty()) return std::nullopt;
  const at::NoGradGuard no_grad;
  const int64_t answer_tokens = AnswerTokens(examples, inputs_.validation);
  const distill::KdSettings kd{.kl_weight = teacher_.validation.empty() ? 0.0 : 1.0};
  Losses losses;
  for (const std::vector<size_t>& part : SplitByTokens(examples, inputs_.validation, settings_.tokens_per_step)) {
    reporter_.Check();
    const TrainBatch batch = MakeBatch(part, inputs_.validation, teacher_.validation, inputs_.student->device());
    const at::Tensor hidden = inputs_.student->Hidden(batch.packed).index_select(0, batch.positions);
    const distill::KdResult result =
        distill::KdLoss(hidden, inputs_.student->lm_head, batch.targets, batch.teacher, kd, answer_tokens);
    losses.kl += result.kl;
    losses.cross_entropy += result.cross_entropy;
  }
  const double loss = teacher_.validation.empty() ? losses.cross_entropy : losses.kl;
  if (!std::isfinite(loss))
    throw runtime::NumericException(Join("step ", step_, ": the validation loss is not finite"));
  return loss;
}

Status Trainer::SaveCheckpoint() {
  const TrainingState state{.step = step_,
                            .cursor = stream_.cursor(),
                            .tokens = tokens_,
                            .fingerprint = Fingerprint(inputs_, settings_),
                            .adapter = factors_.ToAdapter(inputs_.base_model),
                            .optimizer = optimizer_->State(),
                            .curve = curve_};
  RF_RETURN_IF_ERROR(SaveTrainingState(state, paths_.folder));
  reporter_.CheckpointReady(CheckpointName(step_), static_cast<uint64_t>(step_));
  return absl::OkStatus();
}

void Trainer::Report(const CurvePoint& point, uint64_t step_tokens, double step_seconds) {
  reporter_.Report({.phase = "training",
                    .done = static_cast<double>(step_),
                    .total = static_cast<double>(settings_.steps),
                    .loss = point.loss,
                    .tokens_per_second = static_cast<double>(step_tokens) / std::max(step_seconds, 1e-9),
                    .tokens_trained = tokens_this_attempt_});
}

}  // namespace

StatusOr<TrainResult> Train(const TrainInputs& inputs, const TrainSettings& settings, const CheckpointPaths& paths,
                            runtime::Reporter& reporter) {
  RF_RETURN_IF_ERROR(CheckSettings(settings));
  RF_RETURN_IF_ERROR(CheckInputs(inputs, settings));
  RF_ASSIGN_OR_RETURN(TeacherTables teacher, LookUpTeacher(inputs, settings));
  Trainer trainer(inputs, settings, paths, reporter, std::move(teacher));
  if (!paths.resume.empty()) RF_RETURN_IF_ERROR(trainer.Resume());
  return trainer.Run();
}

}  // namespace refinery::train
