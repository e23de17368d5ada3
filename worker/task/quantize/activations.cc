#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include "worker/task/quantize/activations.h"

#include <algorithm>
#include <cmath>

#include "worker/task/model/ops.h"
#include "worker/task/model/projection.h"

namespace refinery::quantize {
namespace {

constexpr int64_t kWidestBytes = int64_t{24} << 20;  // of gate and up side by side: glibc keeps no freed block above 32 MiB
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
    chunk.first = tokens_;
    chunk.hidden = model.Embed(at::tensor(ids, at::kLong).to(model.device()));
    if (weighted) SetWeights(weights, chunk);
    tokens_ += chunk.hidden.size(0);
    counted_ += chunk.counted.defined() ? chunk.counted.size(0) : chunk.hidden.size(0);
    chunks_.push_back(std::move(chunk));
  }
  if (chunks_.empty()) return;
  hidden_ = at::empty({tokens_, model.config().hidden_size}, chunks_[0].hidden.options());
  for (Chunk& chunk : chunks_) {
    const at::Tensor own = hidden_.narrow(0, chunk.first, chunk.hidden.size(0));
    own.copy_(chunk.hidden);
    chunk.hidden = own;
  }
}

at::Tensor Activations::Place(const Chunk& chunk, int64_t columns) const {
  const model::ModelConfig& c = model_.config();
  const int64_t narrow = std::max(c.hidden_size, c.num_heads * c.head_dim);
  const int64_t widest = keep_inputs_ ? std::max(narrow, c.intermediate_size) : narrow;
  if (columns > widest) return {};
  if (!inputs_.defined()) inputs_ = at::empty({tokens_ * widest}, hidden_.options());
  const int64_t rows = chunk.hidden.size(0);
  return inputs_.narrow(0, chunk.first * widest, rows * columns).view({rows, columns});
}

at::Tensor Activations::Next(const model::DecoderLayer& layer, Stage stage, Chunk& c, const at::Tensor& input) const {
  switch (stage) {
    case Stage::kQkv:
      return model_.Normalize(c.hidden, layer.input_norm);
    case Stage::kO: {
      const std::vector<at::Tensor> qkv =
          model::Project(input, {&layer.q, &layer.k, &layer.v})
              .split_with_sizes({layer.q.outputs(), layer.k.outputs(), layer.v.outputs()}, 1);
      return model_.Attend(layer, qkv[0], qkv[1], qkv[2], c.lengths, c.rotary);
    }
    case Stage::kGateUp:
      c.hidden.add_(layer.o(input));
      return model_.Normalize(c.hidden, layer.post_attention_norm);
    case Stage::kDown:
      return model::ProjectGated(input, layer.gate, layer.up);
  }
  return {};
}

void Activations::Advance(const model::DecoderLayer& layer, Stage stage, Chunk& c) const {
  const at::Tensor next = Next(layer, stage, c, c.input);
  const at::Tensor place = Place(c, next.size(1));
  c.input = place.defined() ? place.copy_(next) : next;
}

void Activations::FinishLayer(const model::DecoderLayer& layer) {
  for (Chunk& chunk : chunks_) {
    if (!chunk.input.defined()) {
      chunk.input = Next(layer, Stage::kDown, chunk, model_.Normalize(chunk.hidden, layer.post_attention_norm));
    }
    chunk.hidden.add_(layer.down(chunk.input));
    chunk.input.reset();
  }
}

void Activations::ForwardLayer(const model::DecoderLayer& layer) {
  for (Chunk& chunk : chunks_) {
    at::Tensor input;
    for (const Stage stage : kStages) input = Next(layer, stage, chunk, input);
    chunk.hidden.add_(layer.down(input));
  }
}

at::Tensor Activations::Counted(const Chunk& chunk, const at::Tensor& input) {
  const at::Tensor kept = chunk.counted.defined() ? input.index_select(0, chunk.counted) : input;
  return chunk.root_weights.defined() ? kept.to(at::kFloat).mul(chunk.root_weights) : kept;
}

}  // namespace refinery::quantize
