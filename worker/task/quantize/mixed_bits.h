// worker/task/quantize/mixed_bits.h
//
// Which linear layers get how many bits, so that a model fits a size and loses least. Layers that a runtime fuses (q k v; gate up)
// always get the same, or vLLM would not load them.
//
// The loss of a group at a width is an estimate of the KL that it alone costs, in nats per token: the relative error of the layer's output
// (residual included) when this group is quantized by GPTQ and nothing else is, times what a unit of such an error costs behind this
// layer. The latter is measured with one copy of the hidden states per layer, quantized in that layer only and carried to the end of the
// model, where its KL to the source is taken. Errors are measured on tokens that the Hessians have not seen.
//
// Errors: INVALID_ARGUMENT for a budget that even the narrowest choice exceeds.  Threads: one caller; deterministic.

#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/quantize/model_quantizer.h"

namespace refinery::quantize {

struct BitsOption {
  int64_t bits = 0;
  int64_t bytes = 0;  // codes, scales and zero points
  double loss = 0;
};

struct BitsGroup {
  std::string name;                   // "model.layers.3.qkv"
  std::vector<std::string> modules;
  int64_t weights = 0;
  std::vector<BitsOption> options;    // by ascending bits
};

// Bytes of one module's codes, float16 scales and zero points, as GPTQ folders hold them.
int64_t ModuleBytes(int64_t out, int64_t in, int64_t bits, int64_t group_size);

// The same as they will be stored; what a budget counts.
using SizeOf = std::function<int64_t(int64_t out, int64_t in, int64_t bits)>;

// Tokens that widths are measured with, and of these those that have a copy per layer: whole sequences of at least so many.
inline constexpr int64_t kWidthTokens = 8192;
int64_t CopiedTokens(int64_t sequence_length);

// One option for each group, as indices, such that their bytes stay within the budget and their losses sum to the least. Exact up to
// a rounding of sizes to 1 / 16,384 of the range between the smallest and the largest choice.
StatusOr<std::vector<size_t>> AllotBits(const std::vector<BitsGroup>& groups, int64_t budget_bytes);

// Runs the model as it is over the tokens and measures every one of `widths` (ascending) for every group. `layers` as in
// QuantizeOptions; `bytes` empty = ModuleBytes.
StatusOr<std::vector<BitsGroup>> MeasureBits(const model::CausalLm& model, const LayerLoader& layers, const TokenSequences& tokens,
                                             const GptqSettings& settings, const std::vector<int64_t>& widths,
                                             runtime::Reporter& reporter, const SizeOf& bytes = {});

// Bits by module, as QuantizeOptions takes them.
std::map<std::string, int64_t> BitsByModule(const std::vector<BitsGroup>& groups, const std::vector<size_t>& chosen);

// A size that the quantized linear layers keep to: bytes, or bits per weight with scales and zero points.
struct SizeBudget {
  double bits_per_weight = 0;
  int64_t bytes = 0;  // 0 = bits_per_weight counts
};

// Bytes that the budget allows these groups.
int64_t BudgetBytes(const std::vector<BitsGroup>& groups, const SizeBudget& budget);

// Before any work: whether the narrowest of `widths` (ascending) keeps to the budget. INVALID_ARGUMENT names the least that would do.
Status CheckBudget(const model::ModelConfig& config, const SizeOf& bytes, const std::vector<int64_t>& widths, const SizeBudget& budget);

}  // namespace refinery::quantize
