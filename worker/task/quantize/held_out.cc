#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include "worker/task/quantize/held_out.h"

#include <cmath>

namespace refinery::quantize {
namespace {

constexpr int64_t kLogitRows = 256;  // positions whose logits are there at once

// The stacked weights of a stage copied into one new storage, so that they are still multiplied at once.
void CopyStage(const std::vector<model::Linear*>& linears) {
  int64_t rows = 0;
  for (const model::Linear* linear : linears) rows += linear->weight.size(0);
  const at::Tensor all = at::empty({rows, linears[0]->weight.size(1)}, linears[0]->weight.options());
  int64_t row = 0;
  for (model::Linear* linear : linears) {
    const at::Tensor own = all.narrow(0, row, linear->weight.size(0));
    own.copy_(linear->weight);
    row += linear->weight.size(0);
    linear->weight = own;
  }
}

}  // namespace

model::DecoderLayer CopyLayer(const model::DecoderLayer& layer) {
  model::DecoderLayer copy = layer;
  for (const Stage stage : kStages) CopyStage(LinearsOf(copy, stage));
  return copy;
}

HeldOut::HeldOut(const model::CausalLm& model, const TokenSequences& sequences)
    : model_(model), source_(model, sequences, true), quantized_(model, sequences, true), rounded_(model, sequences, true),
      sequences_(sequences) {}

void HeldOut::BeforeLayer(const model::DecoderLayer& layer, const GptqSettings& settings,
                          const std::function<int64_t(const std::string&)>& bits_of) {
  source_.ForwardLayer(layer);
  model::DecoderLayer rounded = CopyLayer(layer);
  for (model::Linear* linear : rounded.Linears()) {
    GptqSettings own = settings;
    own.bits = bits_of(linear->name);
    linear->weight.copy_(RoundToNearest(linear->weight, own).Dequantize());
  }
  rounded_.ForwardLayer(rounded);
}

HeldOutFigures HeldOut::Figures() {
  HeldOutFigures figures;
  double loss[3] = {}, kl[3] = {};
  Activations* streams[3] = {&source_, &quantized_, &rounded_};
  size_t sequence = 0;
  for (size_t c = 0; c < source_.chunks().size(); ++c) {
    int64_t first = 0;
    for (const int64_t length : source_.chunks()[c].lengths) {
      while (sequences_.ids[sequence].empty()) ++sequence;
      const std::vector<int32_t>& ids = sequences_.ids[sequence++];
      const at::Tensor targets = at::tensor(std::vector<int64_t>(ids.begin() + 1, ids.end()), at::kLong).to(model_.device());
      for (int64_t begin = 0; begin < length - 1; begin += kLogitRows) {
        const int64_t end = std::min(begin + kLogitRows, length - 1);
        at::Tensor source;
        for (int i = 0; i < 3; ++i) {
          const at::Tensor hidden = streams[i]->chunks()[c].hidden.slice(0, first + begin, first + end);
          const at::Tensor logits = model_.Logits(model_.Normalize(hidden, model_.final_norm)).to(at::kFloat);
          const at::Tensor logs = at::log_softmax(logits, 1);
          loss[i] -= logs.gather(1, targets.slice(0, begin, end).unsqueeze(1)).sum(at::kDouble).item<double>();
          if (i == 0) source = logs;
          if (i > 0) kl[i] += (source.exp() * (source - logs)).sum(at::kDouble).item<double>();
        }
        figures.tokens += end - begin;
      }
      first += length;
    }
  }
  const auto count = static_cast<double>(std::max<int64_t>(1, figures.tokens));
  figures.source_perplexity = std::exp(loss[0] / count);
  figures.quantized_perplexity = std::exp(loss[1] / count);
  figures.rounded_perplexity = std::exp(loss[2] / count);
  figures.quantized_kl = kl[1] / count;
  figures.rounded_kl = kl[2] / count;
  return figures;
}

}  // namespace refinery::quantize
