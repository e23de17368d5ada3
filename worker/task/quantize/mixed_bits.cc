#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include "worker/task/quantize/mixed_bits.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "worker/task/quantize/hessian.h"
#include "worker/task/quantize/prepared_hessian.h"
#include "worker/task/quantize/quantize_plan.h"

namespace refinery::quantize {
namespace {

constexpr int64_t kUnits = 16384;

// tr(E H E^T)
double Energy(const at::Tensor& difference, const at::Tensor& hessian) {
  return (at::mm(difference, hessian) * difference).sum(at::kDouble).item<double>();
}

// What one layer is, in numbers: the groups of its four stages with relative errors as losses, before these are scaled.
class LayerProbe {
 public:
  LayerProbe(const GptqSettings& settings, const std::vector<int64_t>& widths, runtime::Reporter& reporter)
      : settings_(settings), widths_(widths), reporter_(reporter) {}

  std::vector<BitsGroup> Measure(model::DecoderLayer& layer, int64_t index, Activations& activations) {
    std::vector<BitsGroup> groups;
    for (const Stage stage : kStages) {
      Hessian hessian(LinearsOf(layer, stage)[0]->inputs(), activations.chunks()[0].hidden.device());
      for (Chunk& chunk : activations.chunks()) {
        reporter_.Check();
        activations.Advance(layer, stage, chunk);
        hessian.Add(stage == Stage::kO || stage == Stage::kDown ? PerResidual(chunk) : chunk.input);
      }
      groups.push_back(MeasureStage(layer, index, stage, hessian.Matrix()));
    }
    activations.FinishLayer(layer);
    // Of q k v and o: what attention adds; of gate up and down: what the MLP adds, both as a mean over tokens.
    const auto tokens = static_cast<double>(activations.tokens());
    const double attention = std::min(1.0, outputs_[1] / tokens), mlp = std::min(1.0, outputs_[3] / tokens);
    for (size_t stage = 0; stage < groups.size(); ++stage) {
      for (BitsOption& option : groups[stage].options) option.loss *= stage < 2 ? attention : mlp;
    }
    return groups;
  }

 private:
  // Inputs of o or down, each token's divided by the length of the residual that its output is added to: the few tokens whose
  // residual is hundreds of times longer than others' (where attention sinks) would decide everything else.
  static at::Tensor PerResidual(const Chunk& chunk) {
    const at::Tensor length = chunk.hidden.to(at::kFloat).square().sum(1, /*keepdim=*/true).clamp_min_(1e-12).sqrt_();
    return chunk.input.to(at::kFloat).div(length);
  }

  BitsGroup MeasureStage(model::DecoderLayer& layer, int64_t index, Stage stage, const at::Tensor& hessian) {
    BitsGroup group{.name = Join("model.layers.", index, ".", StageName(stage))};
    std::vector<double> errors(widths_.size());
    std::vector<int64_t> bytes(widths_.size());
    double energy = 0;
    for (const model::Linear* linear : LinearsOf(layer, stage)) {
      CheckFinite(linear->name, "weight", linear->weight.to(at::kFloat));
      CheckFinite(linear->name, "Hessian of the calibration inputs", hessian);
      const at::Tensor weight = linear->weight.to(at::kFloat);
      group.modules.push_back(linear->name);
      group.weights += weight.numel();
      energy += Energy(weight, hessian);
      for (size_t i = 0; i < widths_.size(); ++i) {
        GptqSettings own = settings_;
        own.bits = widths_[i];
        errors[i] += Energy(weight - RoundToNearest(weight, own).Dequantize().to(weight.device()), hessian);
        bytes[i] += ModuleBytes(weight.size(0), weight.size(1), own.bits, own.group_size);
      }
    }
    outputs_[static_cast<size_t>(stage)] = energy;
    for (size_t i = 0; i < widths_.size(); ++i) {
      group.options.push_back({.bits = widths_[i], .bytes = bytes[i], .loss = energy > 0 ? errors[i] / energy : 0});
    }
    return group;
  }

  const GptqSettings& settings_;
  const std::vector<int64_t>& widths_;
  runtime::Reporter& reporter_;
  double outputs_[4] = {};
};

}  // namespace

int64_t ModuleBytes(int64_t out, int64_t in, int64_t bits, int64_t group_size) {
  const int64_t size = ResolveGroupSize(group_size, in), groups = (in + size - 1) / size;
  return (out * in * bits + out * groups * (16 + bits)) / 8;
}

int64_t BudgetBytes(const std::vector<BitsGroup>& groups, const SizeBudget& budget) {
  if (budget.bytes > 0) return budget.bytes;
  double weights = 0;
  for (const BitsGroup& group : groups) weights += static_cast<double>(group.weights);
  return static_cast<int64_t>(std::floor(weights * budget.bits_per_weight / 8));
}

Status CheckBudget(const model::ModelConfig& config, int64_t group_size, const std::vector<int64_t>& widths, const SizeBudget& budget) {
  int64_t weights = 0, least = 0;
  for (const ModuleSize& size : ModuleSizes(config)) {
    weights += size.in * size.out * config.num_layers;
    least += ModuleBytes(size.out, size.in, widths.front(), group_size) * config.num_layers;
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
                                             runtime::Reporter& reporter) {
  const at::NoGradGuard no_grad;
  Activations activations(model, tokens, /*keep_inputs=*/true);
  TORCH_CHECK(!activations.chunks().empty(), "no tokens to measure the widths with");
  std::vector<BitsGroup> groups;
  const int64_t count = layers ? model.config().num_layers : static_cast<int64_t>(model.layers.size());
  LayerProbe probe(settings, widths, reporter);
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
  return groups;
}

}  // namespace refinery::quantize
