#include "worker/task/runtime/torch.h"

#include "worker/task/train/prepare.h"

#include <algorithm>

#include "common/digest.h"
#include "worker/task/distill/tail_grid.h"
#include "worker/task/train/batches.h"

namespace refinery::train {
namespace {

Status CheckExamples(const std::vector<data::EncodedExample>& examples, const model::ModelConfig& config,
                     const char* split) {
  for (size_t i = 0; i < examples.size(); ++i) {
    const data::EncodedExample& example = examples[i];
    const auto length = static_cast<int64_t>(example.tokens.size());
    const std::string where = Join(split, " example ", i + 1, " (", example.key, ")");
    if (example.answer_begin < 1 || example.answer_begin >= length) {
      return InvalidArgument(where, ": needs a prompt and an answer, has ", length, " tokens, answer from ",
                             example.answer_begin);
    }
    if (config.max_position > 0 && length > config.max_position) {
      return InvalidArgument(where, ": has ", length, " tokens, the student takes ", config.max_position,
                             "; shorten it");
    }
    const auto outside = [&config](int32_t id) { return id < 0 || id >= config.vocab_size; };
    const auto bad = std::find_if(example.tokens.begin(), example.tokens.end(), outside);
    if (bad != example.tokens.end()) {
      return InvalidArgument(where, ": token id ", *bad, " lies outside the student's vocabulary of ",
                             config.vocab_size);
    }
  }
  return absl::OkStatus();
}

StatusOr<std::vector<distill::TeacherRows>> RowsOf(const std::vector<data::EncodedExample>& examples,
                                                   const distill::LogitCache& cache) {
  std::vector<distill::TeacherRows> rows;
  for (const data::EncodedExample& example : examples) {
    RF_ASSIGN_OR_RETURN(distill::TeacherRows found, cache.Get(example.key));
    if (found.ids.size(0) != AnswerTokens(example)) {
      return DataLoss("logit cache: ", found.ids.size(0), " rows for example ", example.key, ", which has ",
                      AnswerTokens(example), " answer tokens");
    }
    rows.push_back(std::move(found));
  }
  return rows;
}

std::string DigestOfKeys(const std::vector<data::EncodedExample>& examples) {
  Sha256 digest;
  for (const data::EncodedExample& example : examples) digest.Update(example.key + "\n");
  return digest.Finish();
}

}  // namespace

Status CheckSettings(const TrainSettings& settings) {
  const auto check = [](bool holds, const char* name, const char* wanted, double value) {
    return holds ? absl::OkStatus() : InvalidArgument("train: ", name, " must be ", wanted, ", is ", value);
  };
  const TrainSettings& s = settings;
  const auto count = [](int64_t value) { return static_cast<double>(value); };
  RF_RETURN_IF_ERROR(check(s.learning_rate > 0, "learning_rate", "> 0", s.learning_rate));
  const std::string range = Join("in [", distill::kMinTemperature, ", ", distill::kMaxTemperature, "]");
  RF_RETURN_IF_ERROR(check(s.temperature >= distill::kMinTemperature && s.temperature <= distill::kMaxTemperature,
                           "temperature", range.c_str(), s.temperature));
  RF_RETURN_IF_ERROR(check(s.kl_weight >= 0 && s.kl_weight <= 1, "kl_weight", "in [0, 1]", s.kl_weight));
  RF_RETURN_IF_ERROR(check(s.lora_rank > 0, "lora_rank", "> 0", count(s.lora_rank)));
  RF_RETURN_IF_ERROR(check(s.lora_alpha > 0, "lora_alpha", "> 0", s.lora_alpha));
  RF_RETURN_IF_ERROR(check(s.weight_decay >= 0, "weight_decay", ">= 0", s.weight_decay));
  RF_RETURN_IF_ERROR(check(s.momentum >= 0 && s.momentum < 1, "momentum", "in [0, 1)", s.momentum));
  RF_RETURN_IF_ERROR(check(s.beta1 >= 0 && s.beta1 < 1, "beta1", "in [0, 1)", s.beta1));
  RF_RETURN_IF_ERROR(check(s.beta2 >= 0 && s.beta2 < 1, "beta2", "in [0, 1)", s.beta2));
  RF_RETURN_IF_ERROR(check(s.steps > 0, "steps", "> 0", count(s.steps)));
  RF_RETURN_IF_ERROR(check(s.tokens_per_step > 0, "tokens_per_step", "> 0", count(s.tokens_per_step)));
  RF_RETURN_IF_ERROR(check(s.warmup_fraction >= 0 && s.warmup_fraction <= 1, "warmup_fraction", "in [0, 1]",
                           s.warmup_fraction));
  return absl::OkStatus();
}

Status CheckInputs(const TrainInputs& inputs, const TrainSettings& settings) {
  TORCH_CHECK(inputs.student != nullptr, "Train: no student");
  if (inputs.train.empty()) return InvalidArgument("train: there are no training examples");
  const model::ModelConfig& config = inputs.student->config();
  RF_RETURN_IF_ERROR(CheckExamples(inputs.train, config, "training"));
  RF_RETURN_IF_ERROR(CheckExamples(inputs.validation, config, "validation"));
  if (inputs.teacher == nullptr) {
    if (settings.kl_weight > 0) return InvalidArgument("train: kl_weight is above 0, but there are no teacher logits");
    return absl::OkStatus();
  }
  if (inputs.teacher->info().vocab_size > config.vocab_size) {
    return FailedPrecondition("logit cache: made over a vocabulary of ", inputs.teacher->info().vocab_size,
                              ", the student has ", config.vocab_size, "; teacher and student must share a tokenizer");
  }
  return absl::OkStatus();
}

StatusOr<TeacherTables> LookUpTeacher(const TrainInputs& inputs, const TrainSettings&) {
  TeacherTables tables;
  if (inputs.teacher == nullptr) return tables;
  RF_ASSIGN_OR_RETURN(tables.train, RowsOf(inputs.train, *inputs.teacher));
  RF_ASSIGN_OR_RETURN(tables.validation, RowsOf(inputs.validation, *inputs.teacher));
  return tables;
}

std::vector<int64_t> Lengths(const std::vector<data::EncodedExample>& examples) {
  std::vector<int64_t> lengths;
  for (const data::EncodedExample& example : examples) lengths.push_back(static_cast<int64_t>(example.tokens.size()));
  return lengths;
}

std::vector<size_t> ValidationExamples(const std::vector<data::EncodedExample>& examples, int64_t tokens) {
  std::vector<size_t> chosen;
  int64_t used = 0;
  for (size_t i = 0; i < examples.size(); ++i) {
    used += static_cast<int64_t>(examples[i].tokens.size());
    if (tokens > 0 && used > tokens && !chosen.empty()) break;
    chosen.push_back(i);
  }
  return chosen;
}

nlohmann::json Fingerprint(const TrainInputs& inputs, const TrainSettings& settings) {
  return {{"seed", inputs.seed},
          {"base_model", inputs.base_model},
          {"train_examples", DigestOfKeys(inputs.train)},
          {"validation_examples", DigestOfKeys(inputs.validation)},
          {"teacher", inputs.teacher == nullptr ? "" : inputs.teacher->info().teacher_digest},
          {"optimizer", settings.optimizer == OptimizerKind::kMuon ? "muon" : "adamw"},
          {"learning_rate", settings.learning_rate},
          {"temperature", settings.temperature},
          {"kl_weight", settings.kl_weight},
          {"lora_rank", settings.lora_rank},
          {"lora_alpha", settings.lora_alpha},
          {"weight_decay", settings.weight_decay},
          {"momentum", settings.momentum},
          {"beta1", settings.beta1},
          {"beta2", settings.beta2},
          {"steps", settings.steps},
          {"tokens_per_step", settings.tokens_per_step},
          {"warmup_fraction", settings.warmup_fraction},
          {"clip_norm", settings.clip_norm}};
}

}  // namespace refinery::train
