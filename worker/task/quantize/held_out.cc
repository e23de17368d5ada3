#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include "worker/task/quantize/held_out.h"

#include <cmath>

#include "worker/task/quantize/prepared_hessian.h"

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

struct Sums {
  double loss = 0, kl = 0;
};

// Adds positions with `logits` [rows, V] and next tokens `targets` [rows]; their KL is to `source`, log-probabilities, where that is
// defined. Returns the log-probabilities.
at::Tensor AddPositions(const at::Tensor& logits, const at::Tensor& targets, const at::Tensor& source, Sums* sums) {
  const at::Tensor logs = at::log_softmax(logits.to(at::kFloat), 1);
  sums->loss -= logs.gather(1, targets.unsqueeze(1)).sum(at::kDouble).item<double>();
  if (source.defined()) sums->kl += (source.exp() * (source - logs)).sum(at::kDouble).item<double>();
  return logs;
}

at::Tensor NextTokens(const std::vector<int32_t>& ids, at::Device device) {
  return at::tensor(std::vector<int64_t>(ids.begin() + 1, ids.end()), at::kLong).to(device);
}

}  // namespace

Fidelity MeasureFidelity(const model::CausalLm& source, const model::CausalLm& model, const TokenSequences& sequences) {
  const at::NoGradGuard no_grad;
  Sums of_source, of_model;
  Fidelity figures;
  for (const std::vector<int32_t>& ids : sequences.ids) {
    if (ids.size() < 2) continue;
    const auto predicted = static_cast<int64_t>(ids.size()) - 1;
    const model::PackedBatch batch{.token_ids = at::tensor(std::vector<int64_t>(ids.begin(), ids.end()), at::kLong).to(source.device()),
                                   .lengths = {predicted + 1}};
    const at::Tensor from = source.Hidden(batch), to = model.Hidden(batch), targets = NextTokens(ids, source.device());
    for (int64_t begin = 0; begin < predicted; begin += kLogitRows) {
      const int64_t end = std::min(begin + kLogitRows, predicted);
      const at::Tensor next = targets.slice(0, begin, end);
      const at::Tensor logs = AddPositions(source.Logits(from.slice(0, begin, end)), next, {}, &of_source);
      AddPositions(model.Logits(to.slice(0, begin, end)), next, logs, &of_model);
    }
    figures.tokens += predicted;
  }
  const auto count = static_cast<double>(std::max<int64_t>(1, figures.tokens));
  figures.source_perplexity = std::exp(of_source.loss / count);
  figures.perplexity = std::exp(of_model.loss / count);
  figures.kl = of_model.kl / count;
  return figures;
}

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
    CheckFinite(linear->name, "weight", linear->weight);
    linear->weight.copy_(RoundToNearest(linear->weight, own).Dequantize());
  }
  rounded_.ForwardLayer(rounded);
}

HeldOutFigures HeldOut::Figures() {
  HeldOutFigures figures;
  Sums sums[3];
  Activations* streams[3] = {&source_, &quantized_, &rounded_};
  size_t sequence = 0;
  for (size_t c = 0; c < source_.chunks().size(); ++c) {
    int64_t first = 0;
    for (const int64_t length : source_.chunks()[c].lengths) {
      while (sequences_.ids[sequence].empty()) ++sequence;
      const std::vector<int32_t>& ids = sequences_.ids[sequence++];
      const at::Tensor targets = NextTokens(ids, model_.device());
      for (int64_t begin = 0; begin < length - 1; begin += kLogitRows) {
        const int64_t end = std::min(begin + kLogitRows, length - 1);
        at::Tensor source;
        for (int i = 0; i < 3; ++i) {
          const at::Tensor hidden = streams[i]->chunks()[c].hidden.slice(0, first + begin, first + end);
          const at::Tensor logits = model_.Logits(model_.Normalize(hidden, model_.final_norm));
          const at::Tensor logs = AddPositions(logits, targets.slice(0, begin, end), source, &sums[i]);
          if (i == 0) source = logs;
        }
        figures.tokens += end - begin;
      }
      first += length;
    }
  }
  const auto count = static_cast<double>(std::max<int64_t>(1, figures.tokens));
  figures.source_perplexity = std::exp(sums[0].loss / count);
  figures.quantized_perplexity = std::exp(sums[1].loss / count);
  figures.rounded_perplexity = std::exp(sums[2].loss / count);
  figures.quantized_kl = sums[1].kl / count;
  figures.rounded_kl = sums[2].kl / count;
  return figures;
}

}  // namespace refinery::quantize
