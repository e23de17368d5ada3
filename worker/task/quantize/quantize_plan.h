// worker/task/quantize/quantize_plan.h
//
// What a quantization will take, before it starts: bytes from the model's sizes, seconds from its operation counts and rates that
// are measured for a moment on this machine. Per decoder layer, all of which have the same sizes.
//
// Errors: INVALID_ARGUMENT, FAILED_PRECONDITION naming figure and bound.  Threads: one caller.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/model/config.h"
#include "worker/task/quantize/gptq.h"

namespace refinery::quantize {

// One linear layer of every decoder layer.
struct ModuleSize {
  std::string name;  // "mlp.down_proj"
  int64_t in = 0, out = 0;
};
std::vector<ModuleSize> ModuleSizes(const model::ModelConfig& config);
// "model.layers.3.mlp.down_proj"
std::string ModuleName(int64_t layer, const ModuleSize& size);

struct PlanRequest {
  int64_t calibration_tokens = 0;
  int64_t held_out_tokens = 0;
  bool streamed = true;      // one layer's weights at a time
  bool keep_inputs = true;
  bool native_stream = false;  // GPTAQ's second activations
  int64_t width_tokens = 0;    // that widths are measured with before, of the calibration tokens; 0 = no size budget
  int64_t copied_tokens = 0;   // of these, those with a copy per layer (mixed_bits.h)
};

struct MemoryEstimate {
  int64_t program = 0;      // code and libraries
  int64_t weights = 0;      // embeddings, head and the layers that are there at once
  int64_t activations = 0;  // of calibration and held-out tokens
  int64_t working = 0;      // the widest moment of a layer: products of a chunk, or Hessian and solver
  int64_t Total() const { return program + weights + activations + working; }
};
// The larger moment: quantizing, or measuring widths before it.
MemoryEstimate EstimateMemory(const model::ModelConfig& config, const PlanRequest& request);

// Operations a second.
struct Rates {
  double forward = 0;  // multiply-adds of the model's products
  double hessian = 0;  // multiply-adds of X^T X, counted on and above the diagonal
  double factor = 0;   // n^3 of a factorisation
  double columns = 0;  // weights x columns of the column loop
};
// Takes a few tenths of a second.
Rates MeasureRates();
double EstimateLayerSeconds(const model::ModelConfig& config, const PlanRequest& request, const Rates& rates);

struct QuantizePlan {
  MemoryEstimate memory;
  bool keep_inputs = true;
  double layer_seconds = 0;
  int64_t layers = 0;
  std::string Text() const;  // one sentence
};
// Chooses whether the widest inputs are kept. `budget_bytes` 0 = no bound; FAILED_PRECONDITION when even the smallest way of working
// needs more, with the calibration_tokens that would fit.
StatusOr<QuantizePlan> MakePlan(const model::ModelConfig& config, PlanRequest request, int64_t budget_bytes, const Rates& rates);

}  // namespace refinery::quantize
