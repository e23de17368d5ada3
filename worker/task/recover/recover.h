// worker/task/recover/recover.h
//
// Recovery: after quantization the group scales (and norms, where wanted) are tuned by distillation from the model that was
// quantized, the integer codes fixed. The artifact keeps its format, size and speed and loses less.
//
//   loss of a step = KL(source || quantized) over the whole vocabulary, nats per token, at every position
//                    + layer_weight x mean over layers and positions of |h - h_source|^2 / |h_source|^2, h a layer's output
//
// Parameters are relative changes (tunable_model.h); AdamW, linear warm-up, half a cosine. The source's distributions are
// computed in the same step: nothing is cached. Every so many steps the KL of validation sequences is measured with the values
// that would be stored; the best ones are kept, and the run ends early when they do not get better. Where nothing got better
// than the artifact was, it stays as it was, with a note.
//
// Determinism: the same inputs, seed and thread count give the same bits, also when the run is interrupted and resumed.
// Errors: INVALID_ARGUMENT for settings, sequences and models that do not fit, DATA_LOSS / FAILED_PRECONDITION for a checkpoint
// that is damaged or of another run; runtime::NumericException when a loss or gradient is not finite; CancelledException.
// Threads: one caller.

#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/model/causal_lm.h"
#include "worker/task/quantize/model_quantizer.h"
#include "worker/task/runtime/reporter.h"

namespace refinery::recover {

struct RecoverSettings {
  int64_t steps = 120;                // optimizer steps at most
  int64_t tokens_per_step = 512;      // whole sequences
  double learning_rate = 2.5e-3;      // peak; fewer bits take more: 4e-3 below 4. Of the scales' relative change
  double norm_learning_rate = 2.5e-3; // of the norms'; 0 = the norms stay
  double warmup_fraction = 0.05;
  double beta1 = 0.6, beta2 = 0.95;   // AdamW: few steps, so little memory
  double weight_decay = 0;            // pulls changes back to 0
  double clip_norm = 0;               // of all gradients together; 0 = none
  double layer_weight = 40;           // of the distance of the layers' outputs beside the KL; 0 = the KL alone
  int64_t evaluate_every = 60;        // steps between two measurements of the validation KL
  int64_t patience = 1;               // measurements without a new best before the run ends; 0 = never
  int64_t checkpoint_every = 0;       // steps; 0 = none
};

struct RecoverInputs {
  const model::CausalLm* source = nullptr;               // full precision, adapter merged
  std::vector<std::vector<int32_t>> train;               // token sequences of at least two tokens
  std::vector<std::vector<int32_t>> validation;          // none of them in `train`
  uint64_t seed = 0;
};

struct RecoverPaths {
  std::filesystem::path folder;  // gets step-NNNNNN/ folders; empty = no checkpoints
  std::filesystem::path resume;  // a step-NNNNNN folder; empty = from the start
};

struct RecoverPoint {
  int64_t step = 0;
  double kl = 0;  // on the validation sequences, nats per token
};

struct RecoverResult {
  int64_t steps = 0;               // updates made
  int64_t best_step = 0;           // whose values are stored; 0 = the artifact as it was
  uint64_t tokens = 0;             // trained
  double kl_before = 0, kl_after = 0;  // on the validation sequences, nats per token, with stored values
  std::vector<RecoverPoint> curve;
  bool stopped_early = false;
};

// Tunes `quantized` in place. Where best_step is 0 it is unchanged.
StatusOr<RecoverResult> Recover(const RecoverInputs& inputs, const RecoverSettings& settings, const RecoverPaths& paths,
                                runtime::Reporter& reporter, quantize::QuantizedModel* quantized);

}  // namespace refinery::recover
