// worker/task/quantize/activations.h
//
// The activations of many sequences on their way through a decoder, one layer at a time: what GPTQ's Hessians, the streams that
// it is compared with, and the held-out figures are made of. Nothing here knows about codes.
//
// A layer has four stages, the places where linear layers read something: q k v, o, gate up, down ("true sequential" order). The
// input of a stage depends on the weights of the stages before it, so Advance is called once those are final.
//
// Shapes: T tokens of a chunk, H hidden size.  Memory: one hidden state of all tokens and the inputs of the current stage, in the
// model's dtype, each in one block that stays from layer to layer (freed and taken again piece by piece they would tear the heap
// into holes); with `keep_inputs` false the widest inputs (of down) are made again when they are needed, chunk by chunk.
// Errors: c10::Error on shape bugs.  Threads: one caller; the same sequences and weights give the same bits.

#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "worker/task/model/causal_lm.h"

namespace refinery::quantize {

enum class Stage { kQkv, kO, kGateUp, kDown };
inline constexpr std::array<Stage, 4> kStages = {Stage::kQkv, Stage::kO, Stage::kGateUp, Stage::kDown};

// The linear layers that read the input of a stage.
std::vector<model::Linear*> LinearsOf(model::DecoderLayer& layer, Stage stage);
// "qkv", "o", "gate_up", "down"
const char* StageName(Stage stage);

// Token ids to calibrate or measure with.
struct TokenSequences {
  std::vector<std::vector<int32_t>> ids;
  // How much each token counts in a Hessian, >= 0; empty = 1 for all, else one list per sequence of its length. Tokens of weight 0
  // (padding) still stand before others in attention, but no Hessian sees them.
  std::vector<std::vector<float>> weights;
};

// Whole sequences whose tokens are worked on together.
struct Chunk {
  int64_t first = 0;        // token of all
  std::vector<int64_t> lengths;
  model::Rotary rotary;
  at::Tensor hidden;        // [T, H]
  at::Tensor input;         // [T, *] of the linear layers that are next
  at::Tensor counted;       // [T'] int64: tokens of weight > 0; undefined = all
  at::Tensor root_weights;  // [T', 1] float32: square roots of the weights; undefined = all 1
};

class Activations {
 public:
  Activations(const model::CausalLm& model, const TokenSequences& sequences, bool keep_inputs);

  std::vector<Chunk>& chunks() { return chunks_; }
  int64_t tokens() const { return tokens_; }    // all
  int64_t counted() const { return counted_; }  // of weight > 0

  // Makes chunk.input for the stage; stages of a layer follow one another for each chunk.
  void Advance(const model::DecoderLayer& layer, Stage stage, Chunk& chunk) const;
  // Of the last stage, once the Hessian has seen it: lets chunk.input go where it is made again in FinishLayer.
  void Release(Chunk& chunk) const {
    if (!keep_inputs_) chunk.input.reset();
  }
  // After the last stage of all chunks: `hidden` becomes the next layer's.
  void FinishLayer(const model::DecoderLayer& layer);
  // All stages at once.
  void ForwardLayer(const model::DecoderLayer& layer);
  // chunk.input as a Hessian wants it: without tokens of weight 0, scaled by the roots of the weights (then float32).
  static at::Tensor Counted(const Chunk& chunk, const at::Tensor& input);

 private:
  // The input of the stage from that of the stage before; kGateUp also moves chunk.hidden.
  at::Tensor Next(const model::DecoderLayer& layer, Stage stage, Chunk& chunk, const at::Tensor& input) const;
  // Where the chunk's input of so many columns is kept; undefined where it is not.
  at::Tensor Place(const Chunk& chunk, int64_t columns) const;

  const model::CausalLm& model_;
  const bool keep_inputs_;
  at::Tensor hidden_;          // [tokens, H], all chunks
  mutable at::Tensor inputs_;  // [tokens * widest], taken at the first Advance
  std::vector<Chunk> chunks_;
  int64_t tokens_ = 0;
  int64_t counted_ = 0;
};

// Tokens that are worked on together: so many that the widest temporary stays below a fixed size, whatever the model.
int64_t ChunkTokens(const model::ModelConfig& config);

}  // namespace refinery::quantize
