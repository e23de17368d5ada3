// worker/task/train/trainer.h
//
// Distils a teacher's cached distributions into LoRA factors of a frozen student.
//
//   loss of a step = kl_weight T^2 KL_T(teacher || student) + (1 - kl_weight) cross-entropy, over answer tokens only
//
// Factors stand beside all seven linear layers of every block, start as PEFT's do (A uniform in +-1/sqrt(in), B zero)
// and are float32; the student stays in its own dtype. Steps take whole examples without padding (batches.h).
// Learning rate: linear warm-up, then half a cosine. Muon works on both factors with AdamW-matched step sizes.
//
// Validation loss: KL(teacher || student) at temperature 1 over the validation examples, nats per answer token,
// whatever the training temperature and kl_weight, so that trials can be compared (cross-entropy where there is no
// teacher).
//
// Determinism: everything random derives from (seed, name); the same inputs, seed and thread count give the same
// bits, also when the run is interrupted and resumed from a checkpoint.
// Errors: INVALID_ARGUMENT for settings and examples that cannot be trained, NOT_FOUND for an example without teacher
// rows, DATA_LOSS / FAILED_PRECONDITION for a checkpoint that is damaged or of another run; runtime::NumericException
// when loss or gradient is not finite, naming step and layer.
// Threads: one training at a time per student.

#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/checkpoint/peft_adapter.h"
#include "worker/task/data/encoded.h"
#include "worker/task/distill/logit_cache.h"
#include "worker/task/model/causal_lm.h"
#include "worker/task/runtime/reporter.h"
#include "worker/task/train/curve.h"

namespace refinery::train {

enum class OptimizerKind { kMuon, kAdamW };

struct TrainSettings {
  OptimizerKind optimizer = OptimizerKind::kMuon;
  double learning_rate = 2e-3;       // at its peak
  double temperature = 1;            // in [0.5, 8], the logit cache's range
  double kl_weight = 1;              // in [0, 1]
  int64_t lora_rank = 16;
  double lora_alpha = 32;
  double weight_decay = 0;
  double momentum = 0.95;            // Muon
  double beta1 = 0.9;                // AdamW
  double beta2 = 0.999;
  int64_t steps = 30;                // optimizer steps
  int64_t tokens_per_step = 512;     // prompts and answers
  int64_t micro_batch_tokens = 0;    // 0 = the whole step at once; smaller bounds memory, same maths
  int64_t checkpoint_every = 0;      // steps; 0 = none
  double warmup_fraction = 0.1;
  double clip_norm = 1;              // of all gradients together; 0 = no clipping
  int64_t validation_tokens = 0;     // at most so many tokens of the validation examples, in their order; 0 = all
};

struct TrainInputs {
  model::CausalLm* student = nullptr;  // gets factors for the time of the call
  std::string base_model;              // named in the adapter
  std::vector<data::EncodedExample> train;
  std::vector<data::EncodedExample> validation;   // may be empty
  const distill::LogitCache* teacher = nullptr;   // rows of all examples; may be null when kl_weight is 0
  uint64_t seed = 0;
};

struct CheckpointPaths {
  std::filesystem::path folder;  // gets step-NNNNNN/ folders; empty = no checkpoints
  std::filesystem::path resume;  // a step-NNNNNN folder; empty = from the start
};

struct TrainResult {
  checkpoint::PeftAdapter adapter;
  std::vector<CurvePoint> curve;
  std::optional<double> validation_loss;  // after the last step
};

StatusOr<TrainResult> Train(const TrainInputs& inputs, const TrainSettings& settings, const CheckpointPaths& paths,
                            runtime::Reporter& reporter);

}  // namespace refinery::train
