// worker/task/quantize/model_quantizer.h
//
// GPTQ of a whole model in one forward pass over the calibration tokens. Layer by layer, and inside a layer in the order
// q k v, o, gate up, down ("true sequential"): each group of linear layers is quantized from the inputs that the already
// quantized part of the model produces, and the same pass yields the next inputs. Layers that share an input share a Hessian.
//
// Source: Frantar et al. 2022, arXiv:2210.17323.   Shapes: calibration sequences of token ids, of any lengths.
// Memory: two activations of all calibration tokens (hidden state, widest linear input) in the model's dtype; with a layer
// loader one layer's weights instead of all, with a journal no codes.
// Errors: runtime::NumericException naming the module for values that are not finite; runtime::CancelledException; a Status for
// what files and disks do.  Threads: one caller; deterministic for one number of threads.

#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/model/causal_lm.h"
#include "worker/task/quantize/activations.h"
#include "worker/task/quantize/gptq.h"
#include "worker/task/quantize/held_out.h"
#include "worker/task/quantize/quantize_journal.h"
#include "worker/task/runtime/reporter.h"

namespace refinery::quantize {

struct QuantizeTimes {
  double total_seconds = 0;
  double forward_seconds = 0;  // the model's own products, norms and attention
  double hessian_seconds = 0;
  double solve_seconds = 0;    // factorisation and column loops
  double journal_seconds = 0;  // writing and reading finished modules
  std::map<std::string, double> module_seconds;  // solving, by module; a stage's factorisation counts to its first
};

struct QuantizedModel {
  GptqSettings settings;
  std::string calibration_digest;                  // of the token ids; empty for plain rounding
  int64_t calibration_tokens = 0;
  nlohmann::json calibration_facts;                // where they came from (docs/formats.md), for the artifact; may be null
  std::map<std::string, QuantizedLinear> linears;  // by module: "model.layers.3.self_attn.q_proj"; empty with a journal
  std::map<std::string, GptqReport> reports;       // the same keys
  std::map<std::string, at::Tensor> norms;         // tuned by recovery, instead of the base model's: "model.norm.weight"
  nlohmann::json budget;                           // the size that chose the modules' widths (docs/formats.md); null where there was none
  nlohmann::json recovery;                         // how the scales were tuned (docs/formats.md); null where they were not
  std::optional<HeldOutFigures> held_out;          // never stored
  QuantizeTimes times;                             // never stored: artifacts are deterministic
};

// Layer `index` of the model with the weights to quantize.
using LayerLoader = std::function<StatusOr<model::DecoderLayer>(int64_t index)>;

struct QuantizeOptions {
  // Empty: the model's own layers, whose weights become the dequantized ones. Else each layer is read when its turn comes and let
  // go afterwards; model.layers is not touched.
  LayerLoader layers;
  // Finished modules go there instead of into the result; those that it holds already are not quantized again.
  Journal* journal = nullptr;
  // Called when a layer is complete in the journal, and within a layer when the last call was long ago.
  std::function<Status(int64_t modules_done)> publish;
  std::map<std::string, int64_t> bits;      // by module, where they are not settings.bits
  bool keep_inputs = true;                  // false: less memory, the widest products twice
  const TokenSequences* held_out = nullptr;  // measured along the way
};

// Quantizes every linear layer of the decoder.
StatusOr<QuantizedModel> QuantizeModel(model::CausalLm& model, const TokenSequences& calibration, const GptqSettings& settings,
                                       const QuantizeOptions& options, runtime::Reporter& reporter);

// The same for a model in memory: every weight is replaced by the dequantized one, in the model's dtype.
QuantizedModel QuantizeModel(model::CausalLm& model, const std::vector<std::vector<int32_t>>& calibration,
                             const GptqSettings& settings, runtime::Reporter& reporter);

// The same with plain rounding: the baseline. No calibration.
QuantizedModel RoundModelToNearest(model::CausalLm& model, const GptqSettings& settings);

// Whether every linear layer of such a model can be quantized and exported with these settings: bits 2, 3, 4 or 8; sizes
// multiples of 32. INVALID_ARGUMENT names the module and its size.
Status CheckGroupSize(const model::ModelConfig& config, int64_t bits, int64_t group_size);
// What to know about a group size that does not divide every input size: the last group of a row is shorter, which some loaders
// do not take. Names the module, the loaders and the group sizes that divide; "" where the group size divides all.
std::string RaggedGroupsNote(const model::ModelConfig& config, int64_t group_size);

}  // namespace refinery::quantize
