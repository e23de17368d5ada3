#include "worker/task/train/trainer.h"

#include "worker/task/runtime/torch.h"

#include "worker/task/checkpoint/peft_adapter.h"
#include "worker/task/models.h"
#include "worker/task/tasks.h"

namespace refinery::task {
namespace {

StatusOr<std::vector<data::EncodedExample>> EncodeSplit(const TaskContext& context, const char* split, const tokenizer::Tokenizer& tokenizer) {
  RF_ASSIGN_OR_RETURN(std::vector<data::Example> examples, data::ReadExamples(context.inputs / "examples" / split));
  std::vector<data::EncodedExample> encoded;
  for (const data::Example& example : examples) {
    RF_ASSIGN_OR_RETURN(data::EncodedExample one, data::Encode(example, tokenizer, /*append_end=*/false));
    encoded.push_back(std::move(one));
  }
  return encoded;
}

StatusOr<train::TrainSettings> SettingsOf(const TrainSpec& spec) {
  if (spec.optimizer != "muon" && spec.optimizer != "adamw")
    return InvalidArgument("unknown optimizer '", spec.optimizer, "': muon or adamw");
  return train::TrainSettings{.optimizer = spec.optimizer == "muon" ? train::OptimizerKind::kMuon : train::OptimizerKind::kAdamW,
                              .learning_rate = spec.learning_rate,
                              .temperature = spec.temperature,
                              .kl_weight = spec.kl_weight,
                              .lora_rank = spec.lora_rank,
                              .lora_alpha = spec.lora_alpha,
                              .weight_decay = spec.weight_decay,
                              .momentum = spec.momentum,
                              .beta1 = spec.beta1,
                              .beta2 = spec.beta2,
                              .steps = spec.steps,
                              .tokens_per_step = spec.tokens_per_step,
                              .checkpoint_every = spec.checkpoint_every};
}

}  // namespace

Status Train(const TrainSpec& spec, TaskContext& context) {
  RF_ASSIGN_OR_RETURN(ResolvedModel student, ResolveInput(context, "student"));
  RF_ASSIGN_OR_RETURN(auto tokenizer, tokenizer::Tokenizer::Load(student.folder->path()));
  RF_ASSIGN_OR_RETURN(train::TrainSettings settings, SettingsOf(spec));
  RF_ASSIGN_OR_RETURN(std::shared_ptr<distill::LogitCache> teacher, distill::LogitCache::Open(context.inputs / "logits"));
  if (teacher->info().tokenizer_digest != student.ref.tokenizer_digest)
    return FailedPrecondition("the logit cache was made with another tokenizer than the student's");

  train::TrainInputs inputs{.base_model = std::filesystem::path(student.ref.uri).stem().string(), .teacher = teacher.get(), .seed = context.seed};
  RF_ASSIGN_OR_RETURN(inputs.train, EncodeSplit(context, "train.jsonl", *tokenizer));
  RF_ASSIGN_OR_RETURN(inputs.validation, EncodeSplit(context, "validation.jsonl", *tokenizer));
  RF_ASSIGN_OR_RETURN(std::shared_ptr<model::CausalLm> lm, LoadVariant(context, student));
  inputs.student = lm.get();
  RF_ASSIGN_OR_RETURN(train::TrainResult result,
                      train::Train(inputs, settings, {.folder = context.checkpoints, .resume = context.resume}, context.events));

  if (result.validation_loss.has_value())
    context.events.Measure({.name = "validation_loss", .value = *result.validation_loss, .count = inputs.validation.size(), .unit = "nats"});
  if (!result.curve.empty())
    context.events.Measure({.name = "train_loss", .value = result.curve.back().loss, .count = 1, .unit = "nats"});
  // Times stay out of artifacts: the same training must give the same digest.
  for (train::CurvePoint& point : result.curve) point.seconds = 0;
  RF_RETURN_IF_ERROR(train::WriteCurve(result.curve, context.outputs / "curve.jsonl"));
  return checkpoint::SavePeftAdapter(result.adapter, context.outputs);
}

}  // namespace refinery::task
