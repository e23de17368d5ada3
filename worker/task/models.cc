#include "worker/task/models.h"

#include "common/files.h"
#include "worker/task/checkpoint/peft_adapter.h"
#include "worker/task/quantize/quantize_plan.h"
#include "worker/task/quantize/quantized_artifact.h"
#include "worker/task/runtime/device.h"

namespace refinery::task {

StatusOr<ResolvedModel> ResolveInput(const TaskContext& context, const std::string& name) {
  RF_ASSIGN_OR_RETURN(std::filesystem::path input, context.Input(name));
  RF_ASSIGN_OR_RETURN(std::string text, ReadFile(input / "model_ref.json"));
  nlohmann::json json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  RF_ASSIGN_OR_RETURN(checkpoint::ModelRef ref, checkpoint::ModelRefFromJson(json));
  RF_ASSIGN_OR_RETURN(std::filesystem::path folder, checkpoint::ResolveModel(ref, context.cache));
  RF_ASSIGN_OR_RETURN(std::shared_ptr<checkpoint::ModelFolder> opened, checkpoint::ModelFolder::Open(folder));
  return ResolvedModel{.ref = std::move(ref), .folder = std::move(opened)};
}

StatusOr<std::shared_ptr<model::CausalLm>> LoadMerged(const TaskContext& context, const ResolvedModel& resolved) {
  model::LoadOptions options{.dtype = runtime::ComputeType(), .device = runtime::DefaultDevice()};
  RF_ASSIGN_OR_RETURN(std::shared_ptr<model::CausalLm> lm, model::CausalLm::Load(*resolved.folder, options));
  if (context.HasInput("adapter")) {
    RF_ASSIGN_OR_RETURN(checkpoint::PeftAdapter adapter, checkpoint::LoadPeftAdapter(context.inputs / "adapter"));
    RF_RETURN_IF_ERROR(lm->MergeAdapter(adapter));
  }
  return lm;
}

StatusOr<std::shared_ptr<model::CausalLm>> LoadVariant(const TaskContext& context, const ResolvedModel& resolved) {
  RF_ASSIGN_OR_RETURN(std::shared_ptr<model::CausalLm> lm, LoadMerged(context, resolved));
  if (context.HasInput("quantized")) {
    RF_ASSIGN_OR_RETURN(quantize::QuantizedModel quantized, quantize::LoadQuantized(context.inputs / "quantized"));
    RF_RETURN_IF_ERROR(quantize::ApplyQuantized(*lm, quantized));
  }
  return lm;
}

namespace {

// Before hours of work, not at the layer where it would show.
Status CheckAdapter(const checkpoint::PeftAdapter& adapter, const model::ModelConfig& config) {
  std::map<std::string, quantize::ModuleSize> sizes;
  for (int64_t i = 0; i < config.num_layers; ++i) {
    for (const quantize::ModuleSize& size : quantize::ModuleSizes(config)) sizes[quantize::ModuleName(i, size)] = size;
  }
  for (const auto& [module, pair] : adapter.pairs) {
    const auto found = sizes.find(module);
    if (found == sizes.end()) return InvalidArgument("the adapter names '", module, "', which is not a linear layer of this model");
    if (pair.a.size(1) != found->second.in || pair.b.size(0) != found->second.out)
      return InvalidArgument("the adapter's factors for '", module, "' are for a weight of ", pair.b.size(0), " x ", pair.a.size(1),
                             ", the model's is ", found->second.out, " x ", found->second.in);
  }
  return absl::OkStatus();
}

}  // namespace

StatusOr<StreamedModel> OpenStreamed(const TaskContext& context, const ResolvedModel& resolved) {
  const model::LoadOptions options{.dtype = runtime::ComputeType(), .device = runtime::DefaultDevice(), .layers = false};
  StreamedModel streamed;
  RF_ASSIGN_OR_RETURN(streamed.lm, model::CausalLm::Load(*resolved.folder, options));
  auto adapter = std::make_shared<checkpoint::PeftAdapter>();
  if (context.HasInput("adapter")) {
    RF_ASSIGN_OR_RETURN(*adapter, checkpoint::LoadPeftAdapter(context.inputs / "adapter"));
    RF_RETURN_IF_ERROR(CheckAdapter(*adapter, streamed.lm->config()));
  }
  streamed.layer = [folder = resolved.folder, lm = streamed.lm, adapter, options](int64_t index) -> StatusOr<model::DecoderLayer> {
    RF_ASSIGN_OR_RETURN(model::DecoderLayer layer,
                        model::CausalLm::LoadLayer(lm->config(), index, [&](const std::string& name) { return folder->Get(name); }, options));
    for (model::Linear* linear : layer.Linears()) {
      const auto pair = adapter->pairs.find(linear->name);
      if (pair == adapter->pairs.end()) continue;
      const at::Device device = linear->weight.device();
      linear->weight.copy_(checkpoint::MergeLora(linear->weight, {pair->second.a.to(device), pair->second.b.to(device)}, adapter->scale()));
    }
    return layer;
  };
  return streamed;
}

Status CheckSameTokenizer(const ResolvedModel& teacher, const ResolvedModel& student) {
  if (teacher.ref.tokenizer_digest == student.ref.tokenizer_digest) return absl::OkStatus();
  return FailedPrecondition("teacher ", teacher.ref.uri, " and student ", student.ref.uri, " have different tokenizers (",
                            teacher.ref.vocab_size, " and ", student.ref.vocab_size,
                            " entries): distillation compares token by token; choose a teacher of the student's family");
}

}  // namespace refinery::task
