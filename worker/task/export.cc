#include "worker/task/export/export.h"

#include "worker/task/runtime/torch.h"

#include "common/files.h"
#include "worker/task/checkpoint/peft_adapter.h"
#include "worker/task/models.h"
#include "worker/task/quantize/quantized_artifact.h"
#include "worker/task/tasks.h"

namespace refinery::task {

Status Export(const ExportSpec& spec, TaskContext& context) {
  c10::InferenceMode inference;
  context.events.Report({.phase = "exporting", .total = 3});
  RF_ASSIGN_OR_RETURN(ResolvedModel student, ResolveInput(context, "student"));
  RF_ASSIGN_OR_RETURN(checkpoint::PeftAdapter adapter, checkpoint::LoadPeftAdapter(context.inputs / "adapter"));
  RF_ASSIGN_OR_RETURN(quantize::QuantizedModel quantized, quantize::LoadQuantized(context.inputs / "quantized"));
  exporting::ModelCard card{.name = spec.name, .base_model = std::filesystem::path(student.ref.uri).stem().string()};
  RF_RETURN_IF_ERROR(exporting::ExportGptqFolder(*student.folder, quantized, card, context.outputs / "gptq"));
  context.events.Report({.phase = "exporting", .done = 1, .total = 3});
  RF_RETURN_IF_ERROR(exporting::VerifyGptqFolder(*student.folder, quantized, context.outputs / "gptq"));
  RF_RETURN_IF_ERROR(exporting::ExportAdapterFolder(adapter, card, context.outputs / "adapter"));
  if (spec.merged_model) RF_RETURN_IF_ERROR(exporting::ExportMergedFolder(*student.folder, adapter, card, context.outputs / "merged"));
  context.events.Report({.phase = "exporting", .done = 2, .total = 3});
  RF_RETURN_IF_ERROR(exporting::WriteManifest(context.outputs));
  context.events.Report({.phase = "exporting", .done = 3, .total = 3});
  return absl::OkStatus();
}

}  // namespace refinery::task
