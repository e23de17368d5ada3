#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include "worker/task/quantize/mixed_bits.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "worker/task/quantize/activations.h"
#include "worker/task/quantize/hessian.h"
#include "worker/task/quantize/prepared_hessian.h"
#include "worker/task/quantize/quantize_plan.h"

namespace refinery::quantize {
namespace {

constexpr int64_t kUnits = 16384;

// Whole sequences of at least so many tokens, where there are as many.
constexpr int64_t kErrorTokens = 1024;
constexpr int64_t kCopiedTokens = 512;
constexpr int64_t kCopyBits = 3;  // or the next wider: errors well above the rounding of bfloat16, and still small
constexpr int64_t kLogitRows = 128;
constexpr int64_t kBlockTokens = 4096;  // of copies that go through a layer together
constexpr double kSmallest = 1e-30;

// Mean over tokens of |quantized - clean|^2 / |clean|^2.
double RelativeError(const at::Tensor& quantized, const at::Tensor& clean) {
  const at::Tensor from = clean.to(at::kFloat), square = from.square().sum(1).clamp_min_(kSmallest);
  return (quantized.to(at::kFloat) - from).square().sum(1).div_(square).mean().item<double>();
}

double Finite(double value, const std::string& where) {
  if (!std::isfinite(value)) throw runtime::NumericException(Join(where, ": the error that quantization makes there is not finite"));
  return value;
}

// Whole sequences: for Hessians, to measure errors with, and the first of the latter for the copies of LayerProbe.
struct ProbeTokens {
  TokenSequences hessians, errors;
  std::vector<int64_t> lengths, copied_lengths;
  int64_t copied = 0;  // tokens
};

// Errors are measured on other tokens than Hessians see, where there are others.
ProbeTokens Split(const TokenSequences& tokens) {
  ProbeTokens split;
  int64_t seen = 0;
  for (const std::vector<int32_t>& sequence : tokens.ids) {
    if (sequence.empty()) continue;
    if (seen >= kErrorTokens) {
      split.hessians.ids.push_back(sequence);
      continue;
    }
    const auto length = static_cast<int64_t>(sequence.size());
    if (seen < kCopiedTokens) {
      split.copied += length;
      split.copied_lengths.push_back(length);
    }
    split.errors.ids.push_back(sequence);
    split.lengths.push_back(length);
    seen += length;
  }
  TORCH_CHECK(seen > 0, "no tokens to measure the widths with");
  if (split.hessians.ids.empty()) split.hessians = split.errors;
  return split;
}

// The model as it is, and beside it one copy for every layer so far, which is quantized in that layer and in no other.
class LayerProbe {
 public:
  LayerProbe(const model::CausalLm& model, const ProbeTokens& tokens, const GptqSettings& settings, const std::vector<int64_t>& widths,
             const SizeOf& bytes, runtime::Reporter& reporter)
      : model_(model), tokens_(tokens), settings_(settings), widths_(widths), bytes_(bytes), reporter_(reporter) {
    std::vector<int64_t> ids;
    for (const std::vector<int32_t>& sequence : tokens.errors.ids) ids.insert(ids.end(), sequence.begin(), sequence.end());
    clean_ = model.Embed(at::tensor(ids, at::kLong).to(model.device()));
    rotary_ = model.MakeRotary(tokens.lengths);
    const auto found = std::find_if(widths.begin(), widths.end(), [](int64_t bits) { return bits >= kCopyBits; });
    copy_bits_ = found == widths.end() ? widths.front() : *found;
  }

  // The groups of the four stages; as losses the errors of the layer's output, before Damages() says what these cost.
  std::vector<BitsGroup> Measure(model::DecoderLayer& layer, int64_t index, Activations& activations) {
    const at::Tensor next = model_.ForwardLayer(layer, clean_, tokens_.lengths, rotary_);
    AdvanceCopies(layer);
    std::vector<BitsGroup> groups;
    model::DecoderLayer copied = layer;
    for (const Stage stage : kStages) {
      const std::vector<model::Linear*> linears = LinearsOf(layer, stage);
      Hessian hessian(linears[0]->inputs(), clean_.device());
      for (Chunk& chunk : activations.chunks()) {
        reporter_.Check();
        activations.Advance(layer, stage, chunk);
        hessian.Add(chunk.input);
      }
      const PreparedHessian prepared = PrepareHessian(linears[0]->name, hessian.Matrix(), settings_);
      groups.push_back(MeasureStage(layer, index, stage, prepared, next, copied));
    }
    activations.FinishLayer(layer);
    const at::Tensor before = clean_.narrow(0, 0, tokens_.copied), after = next.narrow(0, 0, tokens_.copied);
    copies_.push_back(model_.ForwardLayer(copied, before, tokens_.copied_lengths, model_.MakeRotary(tokens_.copied_lengths)));
    errors_.push_back(RelativeError(copies_.back(), after));
    clean_ = next;
    return groups;
  }

  // After the last layer: KL of the model's words per unit of every layer's error.
  std::vector<double> Damages() {
    std::vector<double> sums(copies_.size());
    for (int64_t begin = 0; begin < tokens_.copied; begin += kLogitRows) {
      const int64_t count = std::min(kLogitRows, tokens_.copied - begin);
      const at::Tensor source = Words(clean_.narrow(0, begin, count)), shares = source.exp();
      for (size_t i = 0; i < copies_.size(); ++i) {
        reporter_.Check();
        sums[i] += (shares * (source - Words(copies_[i].narrow(0, begin, count)))).sum(at::kDouble).item<double>();
      }
    }
    for (size_t i = 0; i < sums.size(); ++i) {
      const double kl = std::max(0.0, Finite(sums[i], Join("model.layers.", i))) / static_cast<double>(tokens_.copied);
      sums[i] = kl / std::max(errors_[i], kSmallest);
    }
    return sums;
  }

 private:
  at::Tensor Words(const at::Tensor& hidden) const {
    return at::log_softmax(model_.Logits(model_.Normalize(hidden, model_.final_norm)).to(at::kFloat), 1);
  }

  // Every copy through the layer, several at once.
  void AdvanceCopies(const model::DecoderLayer& layer) {
    const auto together = static_cast<size_t>(std::max<int64_t>(1, kBlockTokens / tokens_.copied));
    for (size_t first = 0; first < copies_.size(); first += together) {
      reporter_.Check();
      const size_t count = std::min(together, copies_.size() - first);
      std::vector<int64_t> lengths;
      for (size_t i = 0; i < count; ++i) lengths.insert(lengths.end(), tokens_.copied_lengths.begin(), tokens_.copied_lengths.end());
      const at::Tensor block = at::cat(std::vector<at::Tensor>(copies_.begin() + static_cast<std::ptrdiff_t>(first),
                                                               copies_.begin() + static_cast<std::ptrdiff_t>(first + count)));
      const std::vector<at::Tensor> moved =
          model_.ForwardLayer(layer, block, lengths, model_.MakeRotary(lengths)).split(tokens_.copied);
      for (size_t i = 0; i < count; ++i) copies_[first + i] = moved[i];
    }
  }

  // Gives the stage's layers quantized weights in storage of their own.
  void Quantize(model::DecoderLayer& layer, Stage stage, int64_t bits, const PreparedHessian& hessian) const {
    GptqSettings own = settings_;
    own.bits = bits;
    own.refine_sweeps = 0;  // they lower every width's error alike
    std::vector<at::Tensor> rows;
    for (const model::Linear* linear : LinearsOf(layer, stage)) {
      reporter_.Check();
      GptqReport report;
      rows.push_back(GptqPrepared(linear->name, linear->weight, hessian, own, &report).Dequantize().to(linear->weight.options()));
    }
    const at::Tensor all = at::cat(rows);
    int64_t row = 0;
    for (model::Linear* linear : LinearsOf(layer, stage)) {
      linear->weight = all.narrow(0, row, linear->weight.size(0));
      row += linear->weight.size(0);
    }
  }

  // `next` is the clean output of the layer; `copied` gets the stage's weights of copy_bits_.
  BitsGroup MeasureStage(model::DecoderLayer& layer, int64_t index, Stage stage, const PreparedHessian& hessian, const at::Tensor& next,
                         model::DecoderLayer& copied) {
    BitsGroup group{.name = Join("model.layers.", index, ".", StageName(stage))};
    for (const model::Linear* linear : LinearsOf(layer, stage)) {
      group.modules.push_back(linear->name);
      group.weights += linear->weight.numel();
    }
    for (const int64_t bits : widths_) {
      BitsOption option{.bits = bits};
      for (const model::Linear* linear : LinearsOf(layer, stage))
        option.bytes += bytes_(linear->weight.size(0), linear->weight.size(1), bits);
      model::DecoderLayer quantized = layer;
      Quantize(quantized, stage, bits, hessian);
      option.loss = Finite(RelativeError(model_.ForwardLayer(quantized, clean_, tokens_.lengths, rotary_), next), group.name);
      if (bits == copy_bits_) {
        const std::vector<model::Linear*> from = LinearsOf(quantized, stage), to = LinearsOf(copied, stage);
        for (size_t i = 0; i < from.size(); ++i) to[i]->weight = from[i]->weight;
      }
      group.options.push_back(option);
    }
    return group;
  }

  const model::CausalLm& model_;
  const ProbeTokens& tokens_;
  const GptqSettings& settings_;
  const std::vector<int64_t>& widths_;
  const SizeOf& bytes_;
  runtime::Reporter& reporter_;
  int64_t copy_bits_ = 0;
  model::Rotary rotary_;
  at::Tensor clean_;                // [tokens, H] into the next layer
  std::vector<at::Tensor> copies_;  // [copied, H], one per layer so far
  std::vector<double> errors_;      // of each copy behind its own layer
};

}  // namespace

int64_t ModuleBytes(int64_t out, int64_t in, int64_t bits, int64_t group_size) {
  const int64_t size = ResolveGroupSize(group_size, in), groups = (in + size - 1) / size;
  return (out * in * bits + out * groups * (16 + bits)) / 8;
}

int64_t CopiedTokens(int64_t sequence_length) {
  const int64_t length = std::max<int64_t>(1, sequence_length);
  return (kCopiedTokens + length - 1) / length * length;
}

int64_t BudgetBytes(const std::vector<BitsGroup>& groups, const SizeBudget& budget) {
  if (budget.bytes > 0) return budget.bytes;
  double weights = 0;
  for (const BitsGroup& group : groups) weights += static_cast<double>(group.weights);
  return static_cast<int64_t>(std::floor(weights * budget.bits_per_weight / 8));
}

Status CheckBudget(const model::ModelConfig& config, const SizeOf& bytes, const std::vector<int64_t>& widths, const SizeBudget& budget) {
  int64_t weights = 0, least = 0;
  for (const ModuleSize& size : ModuleSizes(config)) {
    weights += size.in * size.out * config.num_layers;
    least += bytes(size.out, size.in, widths.front()) * config.num_layers;
  }
  const double least_bits = 8 * static_cast<double>(least) / static_cast<double>(weights);
  const std::string narrowest = Join(widths.front(), " bits, the narrowest of quantize.gptq.widths, take ", least, " bytes in all linear layers");
  if (budget.bytes > 0 && budget.bytes < least)
    return InvalidArgument("quantize.gptq.bytes_budget is ", budget.bytes, ", but ", narrowest);
  if (budget.bytes == 0 && budget.bits_per_weight < least_bits)
    return InvalidArgument("quantize.gptq.bits_budget is ", budget.bits_per_weight, ", but ", narrowest, ", ",
                           std::ceil(least_bits * 1000) / 1000, " bits a weight with scales and zero points");
  return absl::OkStatus();
}

StatusOr<std::vector<size_t>> AllotBits(const std::vector<BitsGroup>& groups, int64_t budget_bytes) {
  int64_t least = 0, most = 0;
  for (const BitsGroup& group : groups) {
    least += group.options.front().bytes;
    most += group.options.back().bytes;
  }
  if (budget_bytes < least) {
    return InvalidArgument("a budget of ", budget_bytes, " bytes is below the ", least, " that ", groups.empty() ? 0 : groups[0].options[0].bits,
                           " bits everywhere take");
  }
  // Sizes above the smallest choice, in units; rounded up, so that the budget holds.
  const int64_t unit = std::max<int64_t>(1, (most - least) / kUnits);
  const int64_t capacity = (std::min(budget_bytes, most) - least) / unit;
  const auto slots = static_cast<size_t>(std::max<int64_t>(0, capacity)) + 1;
  std::vector<double> best(slots, 0);  // least loss of the groups so far within so many units
  std::vector<std::vector<uint8_t>> choice(groups.size(), std::vector<uint8_t>(slots, 0));
  for (size_t g = 0; g < groups.size(); ++g) {
    std::vector<double> next(slots, std::numeric_limits<double>::infinity());
    for (size_t o = 0; o < groups[g].options.size(); ++o) {
      const int64_t extra = groups[g].options[o].bytes - groups[g].options.front().bytes;
      const auto cost = static_cast<size_t>((extra + unit - 1) / unit);
      for (size_t s = cost; s < slots; ++s) {
        const double loss = best[s - cost] + groups[g].options[o].loss;
        if (loss >= next[s]) continue;
        next[s] = loss;
        choice[g][s] = static_cast<uint8_t>(o);
      }
    }
    best = std::move(next);
  }
  std::vector<size_t> chosen(groups.size());
  size_t left = slots - 1;
  for (size_t g = groups.size(); g-- > 0;) {
    chosen[g] = choice[g][left];
    const int64_t extra = groups[g].options[chosen[g]].bytes - groups[g].options.front().bytes;
    left -= static_cast<size_t>((extra + unit - 1) / unit);
  }
  return chosen;
}

std::map<std::string, int64_t> BitsByModule(const std::vector<BitsGroup>& groups, const std::vector<size_t>& chosen) {
  std::map<std::string, int64_t> bits;
  for (size_t g = 0; g < groups.size(); ++g) {
    for (const std::string& module : groups[g].modules) bits[module] = groups[g].options[chosen[g]].bits;
  }
  return bits;
}

StatusOr<std::vector<BitsGroup>> MeasureBits(const model::CausalLm& model, const LayerLoader& layers, const TokenSequences& tokens,
                                             const GptqSettings& settings, const std::vector<int64_t>& widths,
                                             runtime::Reporter& reporter, const SizeOf& bytes) {
  const at::NoGradGuard no_grad;
  std::vector<BitsGroup> groups;
  const int64_t count = layers ? model.config().num_layers : static_cast<int64_t>(model.layers.size());
  const ProbeTokens split = Split(tokens);
  Activations activations(model, split.hessians, /*keep_inputs=*/true);
  const SizeOf size = bytes ? bytes : [&](int64_t out, int64_t in, int64_t bits) { return ModuleBytes(out, in, bits, settings.group_size); };
  LayerProbe probe(model, split, settings, widths, size, reporter);
  for (int64_t i = 0; i < count; ++i) {
    model::DecoderLayer layer;
    if (layers) {
      RF_ASSIGN_OR_RETURN(layer, layers(i));
    } else {
      layer = model.layers[static_cast<size_t>(i)];
    }
    for (BitsGroup& group : probe.Measure(layer, i, activations)) groups.push_back(std::move(group));
    reporter.Report({.phase = Join("measuring widths, layer ", i + 1, "/", count), .done = static_cast<double>(i + 1),
                     .total = static_cast<double>(count)});
  }
  const std::vector<double> damages = probe.Damages();
  for (size_t g = 0; g < groups.size(); ++g) {
    for (BitsOption& option : groups[g].options) option.loss *= damages[g / kStages.size()];
  }
  return groups;
}

}  // namespace refinery::quantize
