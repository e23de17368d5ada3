// worker/task/quantize/model_quantizer.h
//
// GPTQ of a whole model in one forward pass over the calibration tokens. Layer by layer, and inside a layer in the order
// q k v, o, gate up, down ("true sequential"): each group of linear layers is quantized from the inputs that the already
// quantized part of the model produces, and the same pass yields the next inputs. Layers that share an input share a Hessian.
//
// Source: Frantar et al. 2022, arXiv:2210.17323.   Shapes: calibration sequences of token ids, of any lengths.
// Memory: two activations of all calibration tokens (hidden state, widest linear input) in the model's dtype.
// Errors: runtime::NumericException naming the module for values that are not finite; runtime::CancelledException.
// Threads: one caller; deterministic for one number of threads.

#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/model/causal_lm.h"
#include "worker/task/quantize/gptq.h"
#include "worker/task/runtime/reporter.h"

namespace refinery::quantize {

struct QuantizeTimes {
  double total_seconds = 0;
  double forward_seconds = 0;  // the model's own products, norms and attention
  double hessian_seconds = 0;
  double solve_seconds = 0;    // factorisation and column loops
};

struct QuantizedModel {
  GptqSettings settings;
  std::string calibration_digest;                  // of the token ids; empty for plain rounding
  int64_t calibration_tokens = 0;
  std::map<std::string, QuantizedLinear> linears;  // by module: "model.layers.3.self_attn.q_proj"
  std::map<std::string, GptqReport> reports;       // the same keys
  QuantizeTimes times;                             // never stored: artifacts are deterministic
};

// Whether every linear layer of such a model can be quantized and exported with these settings: bits 2, 3, 4 or 8; sizes
// multiples of 32; a group size that divides them all. INVALID_ARGUMENT names the module, its size and the legal group sizes.
Status CheckGroupSize(const model::ModelConfig& config, int64_t bits, int64_t group_size);

// Quantizes every linear layer of the decoder and replaces its weight by the dequantized one, in the model's dtype.
QuantizedModel QuantizeModel(model::CausalLm& model, const std::vector<std::vector<int32_t>>& calibration,
                             const GptqSettings& settings, runtime::Reporter& reporter);

// The same with plain rounding: the baseline. No calibration.
QuantizedModel RoundModelToNearest(model::CausalLm& model, const GptqSettings& settings);

}  // namespace refinery::quantize
