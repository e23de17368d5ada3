#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include "worker/task/quantize/activations.h"

#include <algorithm>
#include <cmath>

#include "worker/task/model/ops.h"
#include "worker/task/model/projection.h"

namespace refinery::quantize {
namespace {

constexpr int64_t kWidestBytes = int64_t{64} << 20;  // of gate and up side by side
constexpr int64_t kLargestChunk = 8192;
constexpr int64_t kChunkUnit = 512;

// Fills `counted` and `root_weights` unless every token counts the same.
void SetWeights(const std::vector<float>& weights, Chunk& chunk) {
  std::vector<int64_t> counted;
  std::vector<float> roots;
  bool all_one = true;
  for (size_t i = 0; i < weights.size(); ++i) {
    TORCH_CHECK(weights[i] >= 0, "a token weight is ", weights[i]);
    if (weights[i] == 0) continue;
    counted.push_back(static_cast<int64_t>(i));
    roots.push_back(std::sqrt(weights[i]));
    all_one = all_one && weights[i] == 1;
  }
  const at::Device device = chunk.hidden.device();
  if (counted.size() < weights.size()) chunk.counted = at::tensor(counted, at::kLong).to(device);
  if (!all_one) chunk.root_weights = at::tensor(roots).unsqueeze(1).to(device);
}

}  // namespace

std::vector<model::Linear*> LinearsOf(model::DecoderLayer& layer, Stage stage) {
  switch (stage) {
    case Stage::kQkv: return {&layer.q, &layer.k, &layer.v};
    case Stage::kO: return {&layer.o};
    case Stage::kGateUp: return {&layer.gate, &layer.up};
    case Stage::kDown: return {&layer.down};
  }
  return {};
}

const char* StageName(Stage stage) {
  constexpr const char* kNames[] = {"qkv", "o", "gate_up", "down"};
  return kNames[static_cast<int>(stage)];
}

int64_t ChunkTokens(const model::ModelConfig& config) {
  const int64_t fitting = kWidestBytes / (4 * std::max<int64_t>(1, config.intermediate_size));
  return std::clamp(fitting / kChunkUnit * kChunkUnit, kChunkUnit, kLargestChunk);
}

Activations::Activations(const model::CausalLm& model, const TokenSequences& sequences, bool keep_inputs)
    : model_(model), keep_inputs_(keep_inputs) {
  const int64_t limit = ChunkTokens(model.config());
  const bool weighted = !sequences.weights.empty();
  TORCH_CHECK(!weighted || sequences.weights.size() == sequences.ids.size(), "token weights for ", sequences.weights.size(),
              " of ", sequences.ids.size(), " sequences");
  size_t next = 0;
  while (next < sequences.ids.size()) {
    Chunk chunk;
    std::vector<int64_t> ids;
    std::vector<float> weights;
    while (next < sequences.ids.size() &&
           (ids.empty() || static_cast<int64_t>(ids.size() + sequences.ids[next].size()) <= limit)) {
      const std::vector<int32_t>& sequence = sequences.ids[next];
      if (weighted) {
        const std::vector<float>& own = sequences.weights[next];
        TORCH_CHECK(own.size() == sequence.size(), "token weights of sequence ", next, ": ", own.size(), " for ", sequence.size());
        weights.insert(weights.end(), own.begin(), own.end());
      }
      ++next;
      if (sequence.empty()) continue;
      ids.insert(ids.end(), sequence.begin(), sequence.end());
      chunk.lengths.push_back(static_cast<int64_t>(sequence.size()));
    }
    if (ids.empty()) continue;
    // Chunks of the same lengths turn by the same angles.
    const bool same = !chunks_.empty() && chunks_.back().lengths == chunk.lengths;
    chunk.rotary = same ? chunks_.back().rotary : model.MakeRotary(chunk.lengths);
    chunk.hidden = model.Embed(at::tensor(ids, at::kLong).to(model.device()));
    if (weighted) SetWeights(weights, chunk);
    tokens_ += chunk.hidden.size(0);
    counted_ += chunk.counted.defined() ? chunk.counted.size(0) : chunk.hidden.size(0);
    chunks_.push_back(std::move(chunk));
  }
}

void Activations::Advance(const model::DecoderLayer& layer, Stage stage, Chunk& c) const {
  switch (stage) {
    case Stage::kQkv:
      c.input = model_.Normalize(c.hidden, layer.input_norm);
      return;
    case Stage::kO: {
      const std::vector<at::Tensor> qkv =
          model::Project(c.input, {&layer.q, &layer.k, &layer.v})
              .split_with_sizes({layer.q.outputs(), layer.k.outputs(), layer.v.outputs()}, 1);
      c.input = model_.Attend(layer, qkv[0], qkv[1], qkv[2], c.lengths, c.rotary);
      return;
    }
    case Stage::kGateUp:
      c.hidden = c.hidden + layer.o(c.input);
      c.input = model_.Normalize(c.hidden, layer.post_attention_norm);
      return;
    case Stage::kDown:
      if (!c.input.defined()) c.input = model_.Normalize(c.hidden, layer.post_attention_norm);
      c.input = model::SiluMul(model::Project(c.input, {&layer.gate, &layer.up}));
      return;
  }
}

void Activations::FinishLayer(const model::DecoderLayer& layer) {
  for (Chunk& chunk : chunks_) {
    if (!chunk.input.defined()) Advance(layer, Stage::kDown, chunk);
    chunk.hidden = chunk.hidden + layer.down(chunk.input);
    chunk.input.reset();
  }
}

void Activations::ForwardLayer(const model::DecoderLayer& layer) {
  for (Chunk& chunk : chunks_) {
    for (const Stage stage : kStages) Advance(layer, stage, chunk);
    chunk.hidden = chunk.hidden + layer.down(chunk.input);
    chunk.input.reset();
  }
}

at::Tensor Activations::Counted(const Chunk& chunk, const at::Tensor& input) {
  const at::Tensor kept = chunk.counted.defined() ? input.index_select(0, chunk.counted) : input;
  return chunk.root_weights.defined() ? kept.to(at::kFloat).mul(chunk.root_weights) : kept;
}

}  // namespace refinery::quantize
