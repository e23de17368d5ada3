#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include "worker/task/quantize/quantize_plan.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>

#include "worker/task/quantize/activations.h"
#include "worker/task/quantize/hessian.h"
#include "worker/task/quantize/model_quantizer.h"
#include "worker/task/quantize/prepared_hessian.h"

namespace refinery::quantize {
namespace {

constexpr int64_t kMiB = int64_t{1} << 20;
constexpr int64_t kProgramBytes = 240 * kMiB;  // refinery-task with LibTorch's pages, measured
constexpr int64_t kFloat64Columns = 4096;      // prepared_hessian.cc
constexpr int64_t kElement = 2;                // bfloat16
constexpr int64_t kLogitRows = 256;            // held_out.cc
constexpr double kGridColumns = 600;           // what choosing the scales of a weight costs, in columns of the column loop

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Seconds of `work`, the better of two.
template <typename Work>
double Seconds(const Work& work) {
  double best = INFINITY;
  for (int i = 0; i < 2; ++i) {
    const double begin = Now();
    work();
    best = std::min(best, Now() - begin);
  }
  return std::max(best, 1e-6);
}

// Inputs of the four stages.
std::vector<int64_t> StageInputs(const model::ModelConfig& c) {
  return {c.hidden_size, c.num_heads * c.head_dim, c.hidden_size, c.intermediate_size};
}

// Powers of two from 16 that divide every `in`, and -1.
std::string DividingGroupSizes(const std::vector<ModuleSize>& sizes) {
  std::string text;
  for (int64_t g = 16; g <= 1024; g *= 2) {
    if (std::all_of(sizes.begin(), sizes.end(), [g](const ModuleSize& s) { return s.in % g == 0; })) text += Join(g, ", ");
  }
  return text + "-1";
}

int64_t LayerWeights(const model::ModelConfig& config) {
  int64_t count = 0;
  for (const ModuleSize& s : ModuleSizes(config)) count += s.in * s.out;
  return count;
}

// The widest moment of solving one module: Hessian, its factors and the weights in float32.
int64_t SolverBytes(const model::ModelConfig& c, bool native_stream) {
  int64_t solver = 0;
  for (const ModuleSize& s : ModuleSizes(c)) {
    const int64_t cross = native_stream ? s.in * s.in * 4 * 3 : 0;  // summed, scaled, and times the inverse
    const int64_t hessian = s.in * s.in * (s.in <= kFloat64Columns ? 4 * 4 + 8 * 5 : 4 * 4 + 4 * 5) + cross;
    solver = std::max(solver, hessian + s.in * s.out * 4 * 6);
  }
  return solver;
}

// A chunk: gate and up, their product, hidden states and norms; in attention q k v twice, angles in float32.
int64_t ForwardBytes(const model::ModelConfig& c, int64_t tokens) {
  const int64_t query = c.num_heads * c.head_dim, key = c.num_kv_heads * c.head_dim, chunk = std::min(ChunkTokens(c), tokens);
  const int64_t products = kElement * chunk * (3 * c.intermediate_size + 4 * c.hidden_size);
  const int64_t attention = chunk * (kElement * 3 * (query + 2 * key) + 4 * 4 * c.head_dim);
  return std::max(products, attention);
}

int64_t TableBytes(const model::ModelConfig& c) { return kElement * (c.tie_word_embeddings ? 1 : 2) * c.vocab_size * c.hidden_size; }

// Of calibration tokens: hidden states and the inputs of a stage.
int64_t ActivationBytes(const model::ModelConfig& c, int64_t tokens, bool keep_inputs) {
  const int64_t narrow = std::max(c.hidden_size, c.num_heads * c.head_dim);
  return kElement * tokens * (c.hidden_size + (keep_inputs ? std::max(narrow, c.intermediate_size) : narrow));
}

// While widths are measured: the layer, a stage of it quantized and the copy's layer; a copy of the hidden states per layer.
MemoryEstimate MeasuringMemory(const model::ModelConfig& c, const PlanRequest& request) {
  const int64_t tokens = std::min(request.width_tokens, request.calibration_tokens), copied = std::min(request.copied_tokens, tokens);
  const int64_t layers = (request.streamed ? 1 : c.num_layers) + 2;
  return {.program = kProgramBytes,
          .weights = TableBytes(c) + kElement * LayerWeights(c) * layers,
          .activations = ActivationBytes(c, tokens, /*keep_inputs=*/true) + kElement * copied * c.hidden_size * (c.num_layers + 2),
          .working = std::max({ForwardBytes(c, tokens), SolverBytes(c, /*native_stream=*/false), 4 * 5 * std::min(kLogitRows, copied) * c.vocab_size})};
}

std::string MiB(int64_t bytes) { return Join((bytes + kMiB - 1) / kMiB, " MiB"); }

}  // namespace

std::vector<ModuleSize> ModuleSizes(const model::ModelConfig& c) {
  const int64_t query = c.num_heads * c.head_dim, key = c.num_kv_heads * c.head_dim;
  return {{"self_attn.q_proj", c.hidden_size, query},  {"self_attn.k_proj", c.hidden_size, key},
          {"self_attn.v_proj", c.hidden_size, key},    {"self_attn.o_proj", query, c.hidden_size},
          {"mlp.gate_proj", c.hidden_size, c.intermediate_size}, {"mlp.up_proj", c.hidden_size, c.intermediate_size},
          {"mlp.down_proj", c.intermediate_size, c.hidden_size}};
}

std::string ModuleName(int64_t layer, const ModuleSize& size) { return Join("model.layers.", layer, ".", size.name); }

Status CheckGroupSize(const model::ModelConfig& config, int64_t bits, int64_t group_size) {
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) return InvalidArgument("bits must be 2, 3, 4 or 8, not ", bits);
  if (group_size != -1 && group_size <= 0) {
    return InvalidArgument("group_size must be -1 (one group a row) or positive, not ", group_size);
  }
  for (const ModuleSize& s : ModuleSizes(config)) {
    if (s.in % 32 != 0 || s.out % 32 != 0) {
      return InvalidArgument("model.layers.*.", s.name, " is ", s.out, " x ", s.in,
                             ": GPTQ checkpoints need multiples of 32; this model cannot be quantized to them");
    }
  }
  return absl::OkStatus();
}

std::string RaggedGroupsNote(const model::ModelConfig& config, int64_t group_size) {
  const std::vector<ModuleSize> sizes = ModuleSizes(config);
  for (const ModuleSize& s : sizes) {
    if (group_size <= 0 || s.in % group_size == 0) continue;
    return Join("group_size ", group_size, " does not divide the input size ", s.in, " of model.layers.*.", s.name,
                ": the last group of each row is shorter. GPTQModel itself loads that, and GGUF holds it; transformers, vLLM "
                "and compressed-tensors do not load it. These divide: ",
                DividingGroupSizes(sizes));
  }
  return "";
}

MemoryEstimate EstimateMemory(const model::ModelConfig& c, const PlanRequest& request) {
  MemoryEstimate m{.program = kProgramBytes};
  const int64_t copies = (request.native_stream ? 1 : 0) + (request.held_out_tokens > 0 ? 1 : 0);
  m.weights = TableBytes(c) + kElement * LayerWeights(c) * ((request.streamed ? 1 : c.num_layers) + copies);
  m.activations = ActivationBytes(c, request.calibration_tokens, request.keep_inputs) * (request.native_stream ? 2 : 1) +
                  kElement * 3 * request.held_out_tokens * c.hidden_size;
  const int64_t logits = request.held_out_tokens > 0 ? 4 * 5 * std::min(kLogitRows, request.held_out_tokens) * c.vocab_size : 0;
  m.working = std::max({ForwardBytes(c, std::max(request.calibration_tokens, request.held_out_tokens)), SolverBytes(c, request.native_stream), logits});
  if (request.width_tokens == 0) return m;
  const MemoryEstimate measuring = MeasuringMemory(c, request);
  return measuring.Total() > m.Total() ? measuring : m;
}

Rates MeasureRates() {
  const at::NoGradGuard no_grad;
  constexpr int64_t kTokens = 2048, kWide = 1024, kSmall = 512;
  const at::Tensor x = at::randn({kTokens, kWide}).to(at::kBFloat16), w = at::randn({kWide, kWide}).to(at::kBFloat16);
  Rates rates;
  rates.forward = static_cast<double>(kTokens * kWide * kWide) / Seconds([&] { (void)at::linear(x, w); });
  rates.hessian = static_cast<double>(kTokens * kWide * kWide) / 2 / Seconds([&] { Hessian(kWide, at::kCPU).Add(x); });
  Hessian small(kSmall, at::kCPU);
  small.Add(x.slice(1, 0, kSmall));
  const at::Tensor matrix = small.Matrix();
  PreparedHessian prepared;
  rates.factor = std::pow(kSmall, 3) / Seconds([&] { prepared = PrepareHessian("a trial", matrix, {}); });
  const at::Tensor weight = w.slice(0, 0, kSmall).slice(1, 0, kSmall).contiguous();
  rates.columns = static_cast<double>(kSmall * kSmall) * (kSmall + kGridColumns) /
                  Seconds([&] { (void)GptqPrepared("a trial", weight, prepared, {}, nullptr); });
  return rates;
}

double EstimateLayerSeconds(const model::ModelConfig& c, const PlanRequest& request, const Rates& rates) {
  const auto tokens = static_cast<double>(request.calibration_tokens);
  double forwards = request.native_stream ? 2 : 1;
  if (!request.keep_inputs) forwards += 2.0 * static_cast<double>(c.hidden_size * c.intermediate_size) / static_cast<double>(LayerWeights(c));
  double seconds = static_cast<double>(LayerWeights(c)) * (tokens * forwards + 3.0 * static_cast<double>(request.held_out_tokens)) / rates.forward;
  for (const int64_t in : StageInputs(c)) {
    const auto n = static_cast<double>(in);
    seconds += tokens * n * n / 2 * (request.native_stream ? 3 : 1) / rates.hessian + n * n * n / rates.factor;
  }
  for (const ModuleSize& s : ModuleSizes(c)) {
    const auto n = static_cast<double>(s.in);
    seconds += static_cast<double>(s.out) * n * (n + kGridColumns) / rates.columns;
  }
  return seconds;
}

std::string QuantizePlan::Text() const {
  char seconds[64];
  std::snprintf(seconds, sizeof(seconds), "%.3g s a layer, %.3g s", layer_seconds, layer_seconds * static_cast<double>(layers));
  return Join("about ", MiB(memory.Total()), " (weights ", MiB(memory.weights), ", activations ", MiB(memory.activations),
              ", working memory ", MiB(memory.working), ") and ", seconds, " for ", layers, " layers",
              keep_inputs ? "" : "; the widest inputs are computed twice to fit the memory budget");
}

StatusOr<QuantizePlan> MakePlan(const model::ModelConfig& config, PlanRequest request, int64_t budget_bytes, const Rates& rates) {
  QuantizePlan plan{.layers = config.num_layers};
  for (const bool keep : {true, false}) {
    request.keep_inputs = plan.keep_inputs = keep;
    plan.memory = EstimateMemory(config, request);
    if (budget_bytes <= 0 || plan.memory.Total() <= budget_bytes) {
      plan.layer_seconds = EstimateLayerSeconds(config, request, rates);
      return plan;
    }
  }
  const auto needed = [&](int64_t tokens) {
    PlanRequest fewer = request;
    fewer.calibration_tokens = tokens;
    return EstimateMemory(config, fewer).Total();
  };
  const int64_t rest = needed(0);
  int64_t fitting = request.calibration_tokens / 1024 * 1024;
  while (fitting > 0 && needed(fitting) > budget_bytes) fitting -= 1024;
  return FailedPrecondition("quantization needs ", plan.Text().substr(0, plan.Text().find(" and ")), ", but memory_mib allows ",
                            MiB(budget_bytes), "; ",
                            fitting >= 1024 ? Join("calibration_tokens ", fitting, " would fit")
                                            : Join("even a few calibration tokens need ", MiB(rest)));
}

}  // namespace refinery::quantize
