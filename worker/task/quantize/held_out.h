// worker/task/quantize/held_out.h
//
// What quantization costs on text that it was not calibrated with: perplexity of the source, of the quantized and of the plainly
// rounded model, and the KL divergence of the last two from the source. Measured beside the quantization, layer by layer, so that
// a model larger than memory is measured too.
//
// Of models that are in memory whole, MeasureFidelity.
//
// Definitions, over all positions that predict a token of the same sequence:
//   perplexity  exp(mean negative log-likelihood of the next token)
//   KL          mean over positions of sum_v p_source(v) (log p_source(v) - log p(v)), in nats
// Dtypes: activations in the model's dtype, softmax and sums in float32, means in float64.
// Errors: c10::Error on shape bugs.  Threads: one caller.

#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "worker/task/model/causal_lm.h"
#include "worker/task/quantize/activations.h"
#include "worker/task/quantize/gptq.h"

namespace refinery::quantize {

// One model beside its source.
struct Fidelity {
  int64_t tokens = 0;  // predicted
  double source_perplexity = 0, perplexity = 0, kl = 0;
  double ratio() const { return perplexity / source_perplexity; }  // of the perplexities
};

struct HeldOutFigures {
  int64_t tokens = 0;  // predicted
  double source_perplexity = 0, quantized_perplexity = 0, rounded_perplexity = 0;
  double quantized_kl = 0, rounded_kl = 0;
  Fidelity Quantized() const {
    return {.tokens = tokens, .source_perplexity = source_perplexity, .perplexity = quantized_perplexity, .kl = quantized_kl};
  }
};

// Sequences of fewer than two tokens are passed over.
Fidelity MeasureFidelity(const model::CausalLm& source, const model::CausalLm& model, const TokenSequences& sequences);

class HeldOut {
 public:
  // `sequences` of at least two tokens each. The model's embeddings, final norm and head are used; its layers are not.
  HeldOut(const model::CausalLm& model, const TokenSequences& sequences);

  // Before a layer is quantized: moves the source's activations, and those of the layer rounded with `bits_of` each module.
  void BeforeLayer(const model::DecoderLayer& layer, const GptqSettings& settings,
                   const std::function<int64_t(const std::string&)>& bits_of);
  void AfterLayer(const model::DecoderLayer& layer) { quantized_.ForwardLayer(layer); }
  HeldOutFigures Figures();

 private:
  const model::CausalLm& model_;
  Activations source_, quantized_, rounded_;
  TokenSequences sequences_;
};

// A copy of the layer whose weights are its own.
model::DecoderLayer CopyLayer(const model::DecoderLayer& layer);

}  // namespace refinery::quantize
