#include "worker/task/runtime/torch.h"

#include "worker/task/quantize/model_quantizer.h"

#include <algorithm>
#include <chrono>
#include <functional>

#include "worker/task/model/ops.h"
#include "worker/task/model/projection.h"
#include "worker/task/quantize/hessian.h"
#include "worker/task/quantize/prepared_hessian.h"
#include "worker/task/quantize/quantized_artifact.h"

namespace refinery::quantize {
namespace {

constexpr int64_t kChunkTokens = 8192;

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Whole sequences whose tokens are worked on together.
struct Chunk {
  std::vector<int64_t> lengths;
  model::Rotary rotary;
  at::Tensor hidden;  // [T, H]
  at::Tensor input;   // [T, *] of the linear layers that are next
};

std::vector<Chunk> MakeChunks(const model::CausalLm& model, const std::vector<std::vector<int32_t>>& calibration) {
  std::vector<Chunk> chunks;
  size_t next = 0;
  while (next < calibration.size()) {
    Chunk chunk;
    std::vector<int64_t> ids;
    while (next < calibration.size() &&
           (ids.empty() || static_cast<int64_t>(ids.size() + calibration[next].size()) <= kChunkTokens)) {
      const std::vector<int32_t>& sequence = calibration[next++];
      if (sequence.empty()) continue;
      ids.insert(ids.end(), sequence.begin(), sequence.end());
      chunk.lengths.push_back(static_cast<int64_t>(sequence.size()));
    }
    if (ids.empty()) continue;
    chunk.rotary = model.MakeRotary(chunk.lengths);
    chunk.hidden = model.Embed(at::tensor(ids, at::kLong).to(model.device()));
    chunks.push_back(std::move(chunk));
  }
  return chunks;
}

// One run over the model; holds what its stages share.
class Run {
 public:
  Run(model::CausalLm& model, const GptqSettings& settings, runtime::Reporter& reporter, QuantizedModel* result)
      : model_(model), settings_(settings), reporter_(reporter), result_(result) {}

  void Quantize(const std::vector<std::vector<int32_t>>& calibration) {
    start_ = Now();
    chunks_ = MakeChunks(model_, calibration);
    for (const Chunk& chunk : chunks_) result_->calibration_tokens += chunk.hidden.size(0);
    TORCH_CHECK(result_->calibration_tokens > 0, "GPTQ needs at least one calibration token");
    for (size_t i = 0; i < model_.layers.size(); ++i) QuantizeLayer(i);
    result_->times.total_seconds = Now() - start_;
  }

 private:
  // Produces the next input of every chunk with `advance`, sums its Hessian and quantizes `linears` with it.
  void Stage(const std::function<void(Chunk&)>& advance, const std::vector<model::Linear*>& linears) {
    Hessian hessian(linears[0]->weight.size(1), model_.device());
    for (Chunk& chunk : chunks_) {
      reporter_.Check();
      const double begin = Now();
      advance(chunk);
      const double middle = Now();
      hessian.Add(chunk.input);
      result_->times.forward_seconds += middle - begin;
      result_->times.hessian_seconds += Now() - middle;
    }
    const double begin = Now();
    const PreparedHessian prepared = PrepareHessian(linears[0]->name, hessian.Matrix(), settings_);
    for (model::Linear* linear : linears) {
      reporter_.Check();
      TORCH_CHECK(!linear->lora_a.defined(), linear->name, ": merge the adapter before quantizing");
      GptqReport& report = result_->reports[linear->name];
      QuantizedLinear quantized = GptqPrepared(linear->name, linear->weight, prepared, settings_, &report);
      for (const std::string& note : report.notes) reporter_.Note("gptq_fallback", Join(linear->name, ": ", note));
      linear->weight.copy_(quantized.Dequantize());  // in place: q k v and gate up stay side by side (projection.h)
      result_->linears[linear->name] = std::move(quantized);
    }
    result_->times.solve_seconds += Now() - begin;
    ++stages_done_;
    Progress();
  }

  void QuantizeLayer(size_t index) {
    model::DecoderLayer& layer = model_.layers[index];
    phase_ = Join("layer ", index + 1, "/", model_.layers.size());
    Stage([&](Chunk& c) { c.input = model_.Normalize(c.hidden, layer.input_norm); }, {&layer.q, &layer.k, &layer.v});
    Stage(
        [&](Chunk& c) {
          const std::vector<at::Tensor> qkv =
              model::Project(c.input, {&layer.q, &layer.k, &layer.v})
                  .split_with_sizes({layer.q.weight.size(0), layer.k.weight.size(0), layer.v.weight.size(0)}, 1);
          c.input = model_.Attend(layer, qkv[0], qkv[1], qkv[2], c.lengths, c.rotary);
        },
        {&layer.o});
    Stage(
        [&](Chunk& c) {
          c.hidden = c.hidden + layer.o(c.input);
          c.input = model_.Normalize(c.hidden, layer.post_attention_norm);
        },
        {&layer.gate, &layer.up});
    Stage([&](Chunk& c) { c.input = model::SiluMul(model::Project(c.input, {&layer.gate, &layer.up})); }, {&layer.down});
    if (index + 1 == model_.layers.size()) return;  // nobody reads what the last layer would give
    const double begin = Now();
    for (Chunk& chunk : chunks_) chunk.hidden = chunk.hidden + layer.down(chunk.input);
    result_->times.forward_seconds += Now() - begin;
  }

  void Progress() {
    const double total = 4.0 * static_cast<double>(model_.layers.size());
    const double seconds = std::max(Now() - start_, 1e-9);
    reporter_.Report({.phase = phase_, .done = stages_done_, .total = total,
                      .tokens_per_second = static_cast<double>(result_->calibration_tokens) * stages_done_ / total / seconds});
  }

  model::CausalLm& model_;
  const GptqSettings& settings_;
  runtime::Reporter& reporter_;
  QuantizedModel* result_;
  std::vector<Chunk> chunks_;
  std::string phase_;
  double start_ = 0;
  double stages_done_ = 0;
};

struct NamedSize {
  std::string name;
  int64_t in, out;
};

std::vector<NamedSize> LinearSizes(const model::ModelConfig& c) {
  const int64_t query = c.num_heads * c.head_dim, key = c.num_kv_heads * c.head_dim;
  return {{"self_attn.q_proj", c.hidden_size, query},  {"self_attn.k_proj", c.hidden_size, key},
          {"self_attn.v_proj", c.hidden_size, key},    {"self_attn.o_proj", query, c.hidden_size},
          {"mlp.gate_proj", c.hidden_size, c.intermediate_size}, {"mlp.up_proj", c.hidden_size, c.intermediate_size},
          {"mlp.down_proj", c.intermediate_size, c.hidden_size}};
}

// Powers of two from 16 that divide every `in`, and -1.
std::string LegalGroupSizes(const std::vector<NamedSize>& sizes) {
  std::string text;
  for (int64_t g = 16; g <= 1024; g *= 2) {
    if (std::all_of(sizes.begin(), sizes.end(), [g](const NamedSize& s) { return s.in % g == 0; })) text += Join(g, ", ");
  }
  return text + "-1";
}

}  // namespace

Status CheckGroupSize(const model::ModelConfig& config, int64_t bits, int64_t group_size) {
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) return InvalidArgument("bits must be 2, 3, 4 or 8, not ", bits);
  if (group_size != -1 && group_size <= 0) {
    return InvalidArgument("group_size must be -1 (one group a row) or positive, not ", group_size);
  }
  const std::vector<NamedSize> sizes = LinearSizes(config);
  for (const NamedSize& s : sizes) {
    if (s.in % 32 != 0 || s.out % 32 != 0) {
      return InvalidArgument("model.layers.*.", s.name, " is ", s.out, " x ", s.in,
                             ": GPTQ checkpoints need multiples of 32; this model cannot be quantized to them");
    }
    if (group_size != -1 && s.in % group_size != 0) {
      return InvalidArgument("group_size ", group_size, " does not divide the input size ", s.in, " of model.layers.*.",
                             s.name, "; choose one of ", LegalGroupSizes(sizes));
    }
  }
  return absl::OkStatus();
}

QuantizedModel QuantizeModel(model::CausalLm& model, const std::vector<std::vector<int32_t>>& calibration,
                             const GptqSettings& settings, runtime::Reporter& reporter) {
  const at::NoGradGuard no_grad;
  QuantizedModel result{.settings = settings, .calibration_digest = CalibrationDigest(calibration)};
  Run(model, settings, reporter, &result).Quantize(calibration);
  return result;
}

QuantizedModel RoundModelToNearest(model::CausalLm& model, const GptqSettings& settings) {
  const at::NoGradGuard no_grad;
  QuantizedModel result{.settings = settings};
  for (model::DecoderLayer& layer : model.layers) {
    for (model::Linear* linear : layer.Linears()) {
      QuantizedLinear quantized = RoundToNearest(linear->weight, settings);
      linear->weight.copy_(quantized.Dequantize());
      result.linears[linear->name] = std::move(quantized);
    }
  }
  return result;
}

}  // namespace refinery::quantize
