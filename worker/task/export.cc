#include "worker/task/export/export.h"

#include "worker/task/runtime/torch.h"

#include <algorithm>

#include "common/files.h"
#include "worker/task/checkpoint/peft_adapter.h"
#include "worker/task/export/gguf_blocks.h"
#include "worker/task/models.h"
#include "worker/task/quantize/quantized_artifact.h"
#include "worker/task/tasks.h"

namespace refinery::task {

namespace {

// What of a GGUF file is not as the recipe's words suggest.
void NoteGguf(const ExportSpec& spec, const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized, TaskContext& context) {
  const auto plain = std::count_if(quantized.linears.begin(), quantized.linears.end(), [](const auto& entry) {
    quantize::QuantizedLinear widened = entry.second;
    widened.bits = std::max<int64_t>(widened.bits, 4);
    return !exporting::HasBlocks(widened);
  });
  if (plain > 0)
    context.events.Note("gguf_plain_weights", Join(plain, " of ", quantized.linears.size(), " linear layers of model.gguf are 16-bit weights: no block type "
                                                   "holds their codes"));
  const StatusOr<model::ModelConfig> config = model::ModelConfig::FromJson(base.config());
  if (spec.gguf_head_q8_0 && config.ok() && config->tie_word_embeddings)
    context.events.Note("gguf_head_tied", "export.gguf.head has no effect: this model's head is its embeddings, whose type export.gguf.embeddings gives");
}

// One folder per format, named like it, from the same codes; each is read back before it counts.
Status ExportFormats(const ExportSpec& spec, TaskContext& context, const checkpoint::ModelFolder& base,
                     const quantize::QuantizedModel& quantized, const exporting::ModelCard& card) {
  RF_ASSIGN_OR_RETURN(const std::vector<exporting::Format> formats, exporting::FormatsOf(spec.formats));
  for (const exporting::Format format : formats) {
    const std::filesystem::path folder = context.outputs / exporting::FormatName(format);
    switch (format) {
      case exporting::Format::kGptq:
      case exporting::Format::kGptqV2:
        RF_RETURN_IF_ERROR(exporting::ExportGptqFolder(base, quantized, card, folder, format));
        break;
      case exporting::Format::kCompressedTensors:
        RF_RETURN_IF_ERROR(exporting::ExportCompressedTensorsFolder(base, quantized, card, folder));
        break;
      case exporting::Format::kGguf:
        RF_RETURN_IF_ERROR(exporting::ExportGgufFolder(
            base, quantized, card, {.embeddings_q8_0 = spec.gguf_embeddings_q8_0, .head_q8_0 = spec.gguf_head_q8_0}, folder));
        NoteGguf(spec, base, quantized, context);
        break;
    }
    RF_ASSIGN_OR_RETURN(const exporting::ModelBytes bytes, exporting::BytesOf(folder));
    const std::string name(exporting::FormatName(format));
    context.events.Measure({.name = name + "/model_bytes", .value = static_cast<double>(bytes.model), .unit = "bytes"});
    context.events.Measure({.name = name + "/model_bytes_without_embeddings", .value = static_cast<double>(bytes.without_embeddings), .unit = "bytes"});
    context.events.Measure({.name = name + "/linear_bytes_to_bf16", .value = bytes.linear_ratio(), .unit = "share"});
  }
  return absl::OkStatus();
}

}  // namespace

Status Export(const ExportSpec& spec, TaskContext& context) {
  c10::InferenceMode inference;
  context.events.Report({.phase = "exporting", .total = 3});
  RF_ASSIGN_OR_RETURN(ResolvedModel student, ResolveInput(context, "student"));
  RF_ASSIGN_OR_RETURN(checkpoint::PeftAdapter adapter, checkpoint::LoadPeftAdapter(context.inputs / "adapter"));
  RF_ASSIGN_OR_RETURN(quantize::QuantizedModel quantized, quantize::LoadQuantized(context.inputs / "quantized"));
  exporting::ModelCard card{.name = spec.name, .base_model = std::filesystem::path(student.ref.uri).stem().string()};
  RF_RETURN_IF_ERROR(ExportFormats(spec, context, *student.folder, quantized, card));
  context.events.Report({.phase = "exporting", .done = 1, .total = 3});
  RF_RETURN_IF_ERROR(exporting::ExportAdapterFolder(adapter, card, context.outputs / "adapter"));
  if (spec.merged_model) RF_RETURN_IF_ERROR(exporting::ExportMergedFolder(*student.folder, adapter, card, context.outputs / "merged"));
  context.events.Report({.phase = "exporting", .done = 2, .total = 3});
  RF_RETURN_IF_ERROR(exporting::WriteManifest(context.outputs));
  context.events.Report({.phase = "exporting", .done = 3, .total = 3});
  return absl::OkStatus();
}

}  // namespace refinery::task
