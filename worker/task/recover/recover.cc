#include "worker/task/runtime/torch.h"

#include "worker/task/recover/recover.h"

#include <chrono>
#include <cmath>
#include <utility>

#include "common/digest.h"
#include "worker/task/optim/adamw.h"
#include "worker/task/optim/schedule.h"
#include "worker/task/quantize/quantized_artifact.h"
#include "worker/task/recover/divergence.h"
#include "worker/task/recover/recover_state.h"
#include "worker/task/recover/tunable_model.h"
#include "worker/task/train/batches.h"

namespace refinery::recover {
namespace {

using Sequences = std::vector<std::vector<int32_t>>;

constexpr int64_t kEvaluationTokens = 2048;  // of one forward pass

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

std::vector<int64_t> Lengths(const Sequences& sequences) {
  std::vector<int64_t> lengths;
  for (const std::vector<int32_t>& sequence : sequences) lengths.push_back(static_cast<int64_t>(sequence.size()));
  return lengths;
}

model::PackedBatch Pack(const Sequences& sequences, const std::vector<size_t>& chosen, at::Device device) {
  std::vector<int64_t> ids;
  model::PackedBatch batch;
  for (const size_t i : chosen) {
    ids.insert(ids.end(), sequences[i].begin(), sequences[i].end());
    batch.lengths.push_back(static_cast<int64_t>(sequences[i].size()));
  }
  batch.token_ids = at::tensor(ids, at::kLong).to(device);
  return batch;
}

// Whole sequences of about kEvaluationTokens together.
std::vector<std::vector<size_t>> Split(const Sequences& sequences) {
  std::vector<std::vector<size_t>> parts;
  int64_t used = 0;
  for (size_t i = 0; i < sequences.size(); ++i) {
    const auto length = static_cast<int64_t>(sequences[i].size());
    if (parts.empty() || used + length > kEvaluationTokens) {
      parts.emplace_back();
      used = 0;
    }
    parts.back().push_back(i);
    used += length;
  }
  return parts;
}

Status CheckSettings(const RecoverSettings& s) {
  if (s.steps < 1) return InvalidArgument("recover.steps must be at least 1, not ", s.steps);
  if (s.tokens_per_step < 1) return InvalidArgument("recover.tokens_per_step must be at least 1, not ", s.tokens_per_step);
  if (!(s.learning_rate > 0 && s.learning_rate <= 0.1)) {
    return InvalidArgument("recover.learning_rate must lie in (0, 0.1], not ", s.learning_rate);
  }
  if (!(s.norm_learning_rate >= 0 && s.norm_learning_rate <= 0.1)) {
    return InvalidArgument("recover.norm_learning_rate must lie in [0, 0.1], not ", s.norm_learning_rate);
  }
  if (!(s.warmup_fraction >= 0 && s.warmup_fraction <= 1)) {
    return InvalidArgument("recover.warmup_fraction must lie in [0, 1], not ", s.warmup_fraction);
  }
  if (!(s.layer_weight >= 0 && s.layer_weight <= 1e6)) {
    return InvalidArgument("recover.layer_weight must lie in [0, 1e6], not ", s.layer_weight);
  }
  if (s.evaluate_every < 1) return InvalidArgument("recover.evaluate_every must be at least 1, not ", s.evaluate_every);
  if (s.patience < 0 || s.checkpoint_every < 0) {
    return InvalidArgument("recover.patience and recover.checkpoint_every must not be negative");
  }
  return absl::OkStatus();
}

Status CheckSequences(const Sequences& sequences, const model::ModelConfig& config, const char* split) {
  if (sequences.empty()) return InvalidArgument("recovery needs at least one ", split, " sequence");
  for (size_t i = 0; i < sequences.size(); ++i) {
    const auto length = static_cast<int64_t>(sequences[i].size());
    if (length < 1) return InvalidArgument(split, " sequence ", i + 1, " is empty");
    if (config.max_position > 0 && length > config.max_position) {
      return InvalidArgument(split, " sequence ", i + 1, " has ", length, " tokens, the model takes ", config.max_position);
    }
    for (const int32_t id : sequences[i]) {
      if (id >= 0 && id < config.vocab_size) continue;
      return InvalidArgument(split, " sequence ", i + 1, ": token id ", id, " lies outside the vocabulary of ", config.vocab_size);
    }
  }
  return absl::OkStatus();
}

// Of the scales that the run starts from.
std::string DigestOfScales(const quantize::QuantizedModel& quantized) {
  Sha256 hash;
  for (const auto& [module, linear] : quantized.linears) {
    const at::Tensor scales = linear.scales.contiguous();
    hash.Update(module);
    hash.Update({static_cast<const char*>(scales.const_data_ptr()), scales.nbytes()});
  }
  return hash.Finish();
}

// Everything that decides the bits of a run, but not how often it is measured by whom or where checkpoints lie.
nlohmann::json Fingerprint(const RecoverInputs& inputs, const RecoverSettings& s, const quantize::QuantizedModel& quantized) {
  return {{"seed", inputs.seed},
          {"scales", DigestOfScales(quantized)},
          {"train", quantize::CalibrationDigest(inputs.train)},
          {"held_out", quantize::CalibrationDigest(inputs.validation)},  // its name in checkpoints of before
          {"steps", s.steps},
          {"tokens_per_step", s.tokens_per_step},
          {"learning_rate", s.learning_rate},
          {"norm_learning_rate", s.norm_learning_rate},
          {"warmup_fraction", s.warmup_fraction},
          {"beta1", s.beta1},
          {"beta2", s.beta2},
          {"weight_decay", s.weight_decay},
          {"clip_norm", s.clip_norm},
          {"layer_weight", s.layer_weight},
          {"evaluate_every", s.evaluate_every},
          {"patience", s.patience}};
}

class Run {
 public:
  Run(const RecoverInputs& inputs, const RecoverSettings& settings, const RecoverPaths& paths, runtime::Reporter& reporter,
      const quantize::QuantizedModel& quantized, std::unique_ptr<TunableModel> model)
      : inputs_(inputs),
        settings_(settings),
        paths_(paths),
        reporter_(reporter),
        fingerprint_(Fingerprint(inputs, settings, quantized)),
        model_(std::move(model)),
        stream_(Lengths(inputs.train), inputs.seed),
        scale_optimizer_(model_->scales(), OptimizerSettings()),
        norm_optimizer_(model_->norms(), OptimizerSettings()),
        schedule_{.peak = 1, .steps = settings.steps, .warmup_fraction = settings.warmup_fraction} {
    parameters_ = model_->scales();
    parameters_.insert(parameters_.end(), model_->norms().begin(), model_->norms().end());
    for (const optim::Parameter& parameter : parameters_) best_.push_back(parameter.value.detach().clone());
  }

  Status Resume();
  StatusOr<RecoverResult> Tune();
  const TunableModel& model() const { return *model_; }

 private:
  optim::AdamWSettings OptimizerSettings() const {
    return {.beta1 = settings_.beta1, .beta2 = settings_.beta2, .weight_decay = settings_.weight_decay};
  }
  void SourceStates();
  double HeldOutKl() const;
  void Measure();
  double Step();
  bool ShouldStop() const;
  Status SaveCheckpoint();

  const RecoverInputs& inputs_;
  const RecoverSettings& settings_;
  const RecoverPaths& paths_;
  runtime::Reporter& reporter_;
  const nlohmann::json fingerprint_;
  std::unique_ptr<TunableModel> model_;
  train::ExampleStream stream_;
  optim::AdamW scale_optimizer_, norm_optimizer_;
  optim::Schedule schedule_;
  std::vector<optim::Parameter> parameters_;
  std::vector<at::Tensor> best_;            // values at the best measurement, like parameters_
  std::vector<at::Tensor> source_states_;   // of the validation sequences, by part
  RecoverResult result_;
};

// The source's hidden states of the validation sequences: computed once, far smaller than its logits.
void Run::SourceStates() {
  const at::NoGradGuard no_grad;
  for (const std::vector<size_t>& part : Split(inputs_.validation)) {
    reporter_.Check();
    source_states_.push_back(inputs_.source->Hidden(Pack(inputs_.validation, part, inputs_.source->device())));
  }
}

double Run::HeldOutKl() const {
  const at::NoGradGuard no_grad;
  const std::vector<std::vector<size_t>> parts = Split(inputs_.validation);
  double sum = 0, tokens = 0;
  for (size_t i = 0; i < parts.size(); ++i) {
    reporter_.Check();
    const at::Tensor hidden = model_->Hidden(Pack(inputs_.validation, parts[i], inputs_.source->device()));
    sum += SumDivergence(hidden, source_states_[i], inputs_.source->lm_head, {}).sum;
    tokens += static_cast<double>(hidden.size(0));
  }
  if (!std::isfinite(sum)) {
    throw runtime::NumericException(Join("recovery, step ", result_.steps, ": the validation KL is not finite"));
  }
  return sum / tokens;
}

// Measures the present values and remembers them where they are the best so far.
void Run::Measure() {
  const double kl = HeldOutKl();
  if (result_.curve.empty()) {
    result_.kl_before = result_.kl_after = kl;
  } else if (kl < result_.kl_after) {
    const at::NoGradGuard no_grad;
    result_.kl_after = kl;
    result_.best_step = result_.steps;
    for (size_t i = 0; i < parameters_.size(); ++i) best_[i].copy_(parameters_[i].value);
  }
  result_.curve.push_back({.step = result_.steps, .kl = kl});
}

double Run::Step() {
  const std::vector<size_t> chosen = stream_.Next(settings_.tokens_per_step);
  const model::PackedBatch batch = Pack(inputs_.train, chosen, inputs_.source->device());
  LayerTargets targets{.weight = settings_.layer_weight};
  at::Tensor source_states;
  {
    const at::NoGradGuard no_grad;
    source_states = inputs_.source->Hidden(batch, settings_.layer_weight > 0 ? &targets.outputs : nullptr);
  }
  optim::ZeroGradients(parameters_);
  const at::Tensor hidden = model_->Hidden(batch, targets);
  const auto tokens = static_cast<double>(hidden.size(0));
  const Divergence divergence = SumDivergence(hidden, source_states, inputs_.source->lm_head, {.normalizer = tokens});
  if (!std::isfinite(divergence.sum)) {
    throw runtime::NumericException(Join("recovery, step ", result_.steps + 1, ": the KL to the source is not finite"));
  }
  hidden.backward(divergence.gradient);
  const double norm = optim::ClipGradients(parameters_, settings_.clip_norm);
  if (!std::isfinite(norm)) {
    throw runtime::NumericException(Join("recovery, step ", result_.steps + 1, ": the gradient is not finite"));
  }
  const double factor = schedule_.At(result_.steps);
  scale_optimizer_.Step(factor * settings_.learning_rate);
  norm_optimizer_.Step(factor * settings_.norm_learning_rate);
  optim::ZeroGradients(parameters_);
  model_->Refresh();
  ++result_.steps;
  result_.tokens += static_cast<uint64_t>(hidden.size(0));
  return divergence.sum / tokens;
}

bool Run::ShouldStop() const {
  if (settings_.patience == 0) return false;
  int64_t without = 0;
  for (auto point = result_.curve.rbegin(); point != result_.curve.rend() && point->step > result_.best_step; ++point) ++without;
  return without >= settings_.patience;
}

StatusOr<RecoverResult> Run::Tune() {
  SourceStates();
  if (result_.curve.empty()) Measure();
  uint64_t tokens_before = result_.tokens;
  while (result_.steps < settings_.steps && !result_.stopped_early) {
    reporter_.Check();
    const double begin = Now();
    const uint64_t tokens = result_.tokens;
    const double kl = Step();
    reporter_.Report({.phase = "recovering",
                      .done = static_cast<double>(result_.steps),
                      .total = static_cast<double>(settings_.steps),
                      .loss = kl,
                      .tokens_per_second = static_cast<double>(result_.tokens - tokens) / std::max(Now() - begin, 1e-9),
                      .tokens_trained = result_.tokens - tokens_before});
    const bool last = result_.steps == settings_.steps;
    if (last || result_.steps % settings_.evaluate_every == 0) {
      Measure();
      result_.stopped_early = !last && ShouldStop();
    }
    if (settings_.checkpoint_every > 0 && result_.steps % settings_.checkpoint_every == 0 && !last && !paths_.folder.empty()) {
      RF_RETURN_IF_ERROR(SaveCheckpoint());
    }
  }
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < parameters_.size(); ++i) parameters_[i].value.copy_(best_[i]);
  model_->Refresh();
  return result_;
}

Status Run::SaveCheckpoint() {
  RecoverState state{.step = result_.steps, .cursor = stream_.cursor(), .tokens = result_.tokens, .curve = result_.curve,
                     .best_step = result_.best_step, .best_kl = result_.kl_after, .fingerprint = fingerprint_};
  for (size_t i = 0; i < parameters_.size(); ++i) {
    state.tensors["value/" + parameters_[i].name] = parameters_[i].value.detach().cpu();
    state.tensors["best/" + parameters_[i].name] = best_[i].cpu();
  }
  for (const optim::AdamW* optimizer : {&scale_optimizer_, &norm_optimizer_}) {
    for (const auto& [name, tensor] : optimizer->State()) state.tensors["optimizer/" + name] = tensor.cpu();
  }
  RF_RETURN_IF_ERROR(SaveRecoverState(state, paths_.folder));
  reporter_.CheckpointReady(CheckpointName(state.step), static_cast<uint64_t>(state.step));
  return absl::OkStatus();
}

Status Run::Resume() {
  RF_ASSIGN_OR_RETURN(const RecoverState state, LoadRecoverState(paths_.resume, fingerprint_));
  const std::string where = paths_.resume.string();
  if (state.step > settings_.steps || state.cursor.position >= static_cast<int64_t>(inputs_.train.size())) {
    return DataLoss(where, ": step and place in the data lie outside this run");
  }
  const at::NoGradGuard no_grad;
  for (size_t i = 0; i < parameters_.size(); ++i) {
    for (const auto& [prefix, target] : {std::pair("value/", parameters_[i].value), std::pair("best/", best_[i])}) {
      const auto found = state.tensors.find(prefix + parameters_[i].name);
      if (found == state.tensors.end() || found->second.sizes() != target.sizes() || found->second.scalar_type() != at::kFloat) {
        return DataLoss(where, ": '", prefix, parameters_[i].name, "' is missing or has another shape");
      }
      at::Tensor(target).copy_(found->second);
    }
  }
  for (auto [optimizer, parameters] : {std::pair(&scale_optimizer_, &model_->scales()), std::pair(&norm_optimizer_, &model_->norms())}) {
    std::map<std::string, at::Tensor> part;
    for (const auto& [name, unused] : optimizer->State()) {
      const auto found = state.tensors.find("optimizer/" + name);
      if (found != state.tensors.end()) part[name] = found->second;
    }
    const Status loaded = optimizer->LoadState(part);
    if (!loaded.ok()) return DataLoss(where, ": ", Message(loaded));
  }
  model_->Refresh();
  stream_.Seek(state.cursor);
  result_ = {.steps = state.step, .best_step = state.best_step, .tokens = state.tokens, .kl_before = state.curve.front().kl,
             .kl_after = state.best_kl, .curve = state.curve};
  result_.stopped_early = ShouldStop();
  return absl::OkStatus();
}

}  // namespace

StatusOr<RecoverResult> Recover(const RecoverInputs& inputs, const RecoverSettings& settings, const RecoverPaths& paths,
                                runtime::Reporter& reporter, quantize::QuantizedModel* quantized) {
  RF_RETURN_IF_ERROR(CheckSettings(settings));
  if (!quantized->norms.empty()) return InvalidArgument("the quantized model was recovered already");
  RF_RETURN_IF_ERROR(CheckSequences(inputs.train, inputs.source->config(), "training"));
  RF_RETURN_IF_ERROR(CheckSequences(inputs.validation, inputs.source->config(), "validation"));
  RF_ASSIGN_OR_RETURN(auto model, TunableModel::Make(*inputs.source, *quantized, settings.norm_learning_rate > 0));
  Run run(inputs, settings, paths, reporter, *quantized, std::move(model));
  if (!paths.resume.empty()) RF_RETURN_IF_ERROR(run.Resume());
  RF_ASSIGN_OR_RETURN(const RecoverResult result, run.Tune());
  if (result.best_step == 0) {
    reporter.Note("recover_kept", Join("no change of the scales lowered the validation KL of ", result.kl_before,
                                       " nats per token; the quantized model stays as it was"));
    return result;
  }
  for (auto& [module, scales] : run.model().StoredScales()) quantized->linears.at(module).scales = scales;
  quantized->norms = run.model().StoredNorms();
  quantized->recovery = {{"steps", result.best_step},
                         {"scheduled_steps", settings.steps},
                         {"evaluate_every", settings.evaluate_every},
                         {"patience", settings.patience},
                         {"tokens_per_step", settings.tokens_per_step},
                         {"learning_rate", settings.learning_rate},
                         {"norm_learning_rate", settings.norm_learning_rate},
                         {"layer_weight", settings.layer_weight},
                         {"seed", inputs.seed},
                         {"train_digest", quantize::CalibrationDigest(inputs.train)},
                         {"validation_digest", quantize::CalibrationDigest(inputs.validation)},
                         {"kl_before", result.kl_before},
                         {"kl_after", result.kl_after}};
  return result;
}

}  // namespace refinery::recover
