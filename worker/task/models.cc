#include "worker/task/models.h"

#include "common/files.h"
#include "worker/task/checkpoint/peft_adapter.h"
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

StatusOr<std::shared_ptr<model::CausalLm>> LoadVariant(const TaskContext& context, const ResolvedModel& resolved) {
  model::LoadOptions options{.dtype = runtime::ComputeType(), .device = runtime::DefaultDevice()};
  RF_ASSIGN_OR_RETURN(std::shared_ptr<model::CausalLm> lm, model::CausalLm::Load(*resolved.folder, options));
  if (context.HasInput("adapter")) {
    RF_ASSIGN_OR_RETURN(checkpoint::PeftAdapter adapter, checkpoint::LoadPeftAdapter(context.inputs / "adapter"));
    RF_RETURN_IF_ERROR(lm->MergeAdapter(adapter));
  }
  if (context.HasInput("quantized")) {
    RF_ASSIGN_OR_RETURN(quantize::QuantizedModel quantized, quantize::LoadQuantized(context.inputs / "quantized"));
    RF_RETURN_IF_ERROR(quantize::ApplyQuantized(*lm, quantized));
  }
  return lm;
}

Status CheckSameTokenizer(const ResolvedModel& teacher, const ResolvedModel& student) {
  if (teacher.ref.tokenizer_digest == student.ref.tokenizer_digest) return absl::OkStatus();
  return FailedPrecondition("teacher ", teacher.ref.uri, " and student ", student.ref.uri, " have different tokenizers (",
                            teacher.ref.vocab_size, " and ", student.ref.vocab_size,
                            " entries): distillation compares token by token; choose a teacher of the student's family");
}

}  // namespace refinery::task
