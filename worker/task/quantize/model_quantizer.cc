#include "worker/task/runtime/torch.h"

#include "worker/task/quantize/model_quantizer.h"

#include <algorithm>
#include <chrono>

#include "worker/task/quantize/hessian.h"
#include "worker/task/quantize/prepared_hessian.h"
#include "worker/task/quantize/quantized_artifact.h"

namespace refinery::quantize {
namespace {

constexpr double kPublishSeconds = 30;  // within a layer
constexpr int64_t kCrossTokens = 2048;   // turned to float32 at a time

double Now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

void AddCross(const Chunk& native, const Chunk& quantized, at::Tensor& cross) {
  const at::Tensor mine = Activations::Counted(quantized, quantized.input), other = Activations::Counted(native, native.input);
  for (int64_t first = 0; first < mine.size(0); first += kCrossTokens) {
    const int64_t end = std::min(first + kCrossTokens, mine.size(0));
    const at::Tensor x = mine.slice(0, first, end).to(at::kFloat);
    cross.addmm_((other.slice(0, first, end).to(at::kFloat) - x).t(), x);
  }
}

// One run over the model; holds what its stages share.
class Run {
 public:
  Run(model::CausalLm& model, const GptqSettings& settings, const QuantizeOptions& options, runtime::Reporter& reporter,
      QuantizedModel* result)
      : model_(model), settings_(settings), options_(options), reporter_(reporter), result_(result) {}

  Status Quantize(const TokenSequences& calibration) {
    start_ = last_published_ = Now();
    // What no Hessian sees, or only the rows that calibration names.
    CheckFinite("model.embed_tokens", "weight", model_.embed_tokens);
    if (!model_.lm_head.is_same(model_.embed_tokens)) CheckFinite("lm_head", "weight", model_.lm_head);
    CheckFinite("model.norm", "weight", model_.final_norm.unsqueeze(0));
    Activations activations(model_, calibration, options_.keep_inputs);
    result_->calibration_tokens = activations.counted();
    TORCH_CHECK(result_->calibration_tokens > 0, "GPTQ needs at least one calibration token");
    activations_ = &activations;
    if (settings_.alpha > 0) native_.emplace(model_, calibration, options_.keep_inputs);
    std::optional<HeldOut> held_out;
    if (options_.held_out != nullptr) held_out.emplace(model_, *options_.held_out);
    for (int64_t i = 0; i < Layers(); ++i) {
      phase_ = Join("layer ", i + 1, "/", Layers());
      model::DecoderLayer loaded;
      if (options_.layers) {
        RF_ASSIGN_OR_RETURN(loaded, options_.layers(i));
      }
      model::DecoderLayer& layer = options_.layers ? loaded : model_.layers[static_cast<size_t>(i)];
      if (held_out) held_out->BeforeLayer(layer, settings_, [this](const std::string& m) { return BitsOf(m); });
      if (native_) native_layer_ = CopyLayer(layer);
      for (const Stage stage : kStages) RF_RETURN_IF_ERROR(QuantizeStage(layer, stage));
      RF_RETURN_IF_ERROR(Publish(/*layer_done=*/true));
      if (held_out) held_out->AfterLayer(layer);
      if (i + 1 == Layers()) break;  // nobody reads what the last layer would give
      const double begin = Now();
      activations.FinishLayer(layer);
      if (native_) native_->FinishLayer(native_layer_);
      result_->times.forward_seconds += Now() - begin;
    }
    if (held_out) result_->held_out = held_out->Figures();
    result_->times.total_seconds = Now() - start_;
    return absl::OkStatus();
  }

 private:
  int64_t Layers() const { return options_.layers ? model_.config().num_layers : static_cast<int64_t>(model_.layers.size()); }

  int64_t BitsOf(const std::string& module) const {
    const auto found = options_.bits.find(module);
    return found == options_.bits.end() ? settings_.bits : found->second;
  }

  // Moves all chunks to the stage's input, sums its Hessian if anything is to be solved, and gives its layers their new weights.
  Status QuantizeStage(model::DecoderLayer& layer, Stage stage) {
    const std::vector<model::Linear*> linears = LinearsOf(layer, stage);
    std::map<std::string, JournalEntry> finished;
    RF_RETURN_IF_ERROR(ReadFinished(linears, &finished));
    const bool solve = finished.size() < linears.size();
    std::optional<Hessian> hessian;
    if (solve) hessian.emplace(linears[0]->inputs(), model_.device());
    at::Tensor cross;  // sum (x_native - x_quantized) x_quantized^T
    if (solve && native_) cross = at::zeros({linears[0]->inputs(), linears[0]->inputs()}, at::device(model_.device()).dtype(at::kFloat));
    for (size_t c = 0; c < activations_->chunks().size(); ++c) {
      Chunk& chunk = activations_->chunks()[c];
      reporter_.Check();
      const double begin = Now();
      activations_->Advance(layer, stage, chunk);
      if (native_) native_->Advance(native_layer_, stage, native_->chunks()[c]);
      const double middle = Now();
      if (solve) hessian->Add(Activations::Counted(chunk, chunk.input));
      if (cross.defined()) AddCross(native_->chunks()[c], chunk, cross);
      if (stage == Stage::kDown) activations_->Release(chunk);
      if (stage == Stage::kDown && native_) native_->Release(native_->chunks()[c]);
      result_->times.forward_seconds += middle - begin;
      result_->times.hessian_seconds += Now() - middle;
    }
    const double begin = Now();
    std::optional<PreparedHessian> prepared;
    if (solve) prepared.emplace(PrepareHessian(linears[0]->name, hessian->Matrix(), settings_, cross));
    hessian.reset();
    result_->times.module_seconds[linears[0]->name] = Now() - begin;
    for (model::Linear* linear : linears) {
      reporter_.Check();
      const auto found = finished.find(linear->name);
      RF_RETURN_IF_ERROR(found != finished.end() ? Put(*linear, std::move(found->second)) : Solve(*linear, *prepared));
    }
    result_->times.solve_seconds += Now() - begin;
    ++stages_done_;
    Progress();
    return Publish(/*layer_done=*/false);
  }

  Status ReadFinished(const std::vector<model::Linear*>& linears, std::map<std::string, JournalEntry>* finished) {
    if (options_.journal == nullptr) return absl::OkStatus();
    for (const model::Linear* linear : linears) {
      RF_ASSIGN_OR_RETURN(std::optional<JournalEntry> entry, options_.journal->Read(linear->name, reporter_));
      if (!entry || entry->linear.codes.sizes() != linear->weight.sizes()) continue;
      (*finished)[linear->name] = *std::move(entry);
    }
    return absl::OkStatus();
  }

  Status Solve(model::Linear& linear, const PreparedHessian& prepared) {
    TORCH_CHECK(!linear.lora_a.defined(), linear.name, ": merge the adapter before quantizing");
    const double begin = Now();
    GptqSettings settings = settings_;
    settings.bits = BitsOf(linear.name);
    JournalEntry entry;
    entry.linear = GptqPrepared(linear.name, linear.weight, prepared, settings, &entry.report);
    result_->times.module_seconds[linear.name] += Now() - begin;
    for (const std::string& note : entry.report.notes) reporter_.Note("gptq_fallback", Join(linear.name, ": ", note));
    if (options_.journal != nullptr) {
      const double write = Now();
      RF_RETURN_IF_ERROR(options_.journal->Write(linear.name, entry.linear, entry.report));
      result_->times.journal_seconds += Now() - write;
      ++unpublished_;
    }
    return Put(linear, std::move(entry));
  }

  Status Put(model::Linear& linear, JournalEntry entry) {
    linear.weight.copy_(entry.linear.Dequantize());  // in place: q k v and gate up stay side by side (projection.h)
    result_->reports[linear.name] = std::move(entry.report);
    if (options_.journal == nullptr) result_->linears[linear.name] = std::move(entry.linear);
    return absl::OkStatus();
  }

  Status Publish(bool layer_done) {
    if (!options_.publish || options_.journal == nullptr || unpublished_ == 0) return absl::OkStatus();
    if (!layer_done && Now() - last_published_ < kPublishSeconds) return absl::OkStatus();
    last_published_ = Now();
    unpublished_ = 0;
    return options_.publish(static_cast<int64_t>(options_.journal->modules().size()));
  }

  void Progress() {
    const double total = 4.0 * static_cast<double>(Layers());
    const double seconds = std::max(Now() - start_, 1e-9);
    reporter_.Report({.phase = phase_, .done = stages_done_, .total = total,
                      .tokens_per_second = static_cast<double>(result_->calibration_tokens) * stages_done_ / total / seconds});
  }

  model::CausalLm& model_;
  const GptqSettings& settings_;
  const QuantizeOptions& options_;
  runtime::Reporter& reporter_;
  QuantizedModel* result_;
  Activations* activations_ = nullptr;
  std::optional<Activations> native_;  // of the weights as they were, for GPTAQ
  model::DecoderLayer native_layer_;
  std::string phase_;
  double start_ = 0, last_published_ = 0;
  double stages_done_ = 0;
  int64_t unpublished_ = 0;
};

}  // namespace

StatusOr<QuantizedModel> QuantizeModel(model::CausalLm& model, const TokenSequences& calibration, const GptqSettings& settings,
                                       const QuantizeOptions& options, runtime::Reporter& reporter) {
  const at::NoGradGuard no_grad;
  QuantizedModel result{.settings = settings, .calibration_digest = CalibrationDigest(calibration.ids)};
  RF_RETURN_IF_ERROR(Run(model, settings, options, reporter, &result).Quantize(calibration));
  return result;
}

QuantizedModel QuantizeModel(model::CausalLm& model, const std::vector<std::vector<int32_t>>& calibration,
                             const GptqSettings& settings, runtime::Reporter& reporter) {
  StatusOr<QuantizedModel> result = QuantizeModel(model, {.ids = calibration, .weights = {}}, settings, {}, reporter);
  TORCH_CHECK(result.ok(), Message(result.status()));  // without files nothing can fail
  return *std::move(result);
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
