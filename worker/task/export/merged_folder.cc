#include "worker/task/runtime/torch.h"

#include <nlohmann/json.hpp>
#include <string_view>

#include "common/files.h"
#include "worker/task/checkpoint/safetensors_writer.h"
#include "worker/task/export/export.h"
#include "worker/task/export/folder_files.h"

namespace refinery::exporting {
namespace {

// The tensor as it is written: bfloat16, merged where the adapter has a pair for it. The base is rounded to bfloat16 first,
// as everywhere in Refinery where a model is loaded, so that the folder holds the weights that were measured.
StatusOr<at::Tensor> MergedTensor(const checkpoint::ModelFolder& base, const checkpoint::PeftAdapter& adapter,
                                  const std::string& name) {
  RF_ASSIGN_OR_RETURN(at::Tensor tensor, base.Get(name));
  if (tensor.is_floating_point()) tensor = tensor.to(at::kBFloat16);
  constexpr std::string_view kSuffix = ".weight";
  if (name.ends_with(kSuffix)) {
    const auto pair = adapter.pairs.find(name.substr(0, name.size() - kSuffix.size()));
    if (pair != adapter.pairs.end()) {
      const at::Tensor &a = pair->second.a, &b = pair->second.b;
      if (tensor.dim() != 2 || a.size(1) != tensor.size(1) || b.size(0) != tensor.size(0) || a.size(0) != b.size(1)) {
        return InvalidArgument("the adapter's ", pair->first, " does not fit the model's weight");
      }
      tensor = checkpoint::MergeLora(tensor, pair->second, adapter.scale());
    }
  }
  return tensor.contiguous();
}

Status WriteMergedWeights(const checkpoint::ModelFolder& base, const checkpoint::PeftAdapter& adapter, bool tied,
                          const std::filesystem::path& path) {
  std::map<std::string, checkpoint::TensorSpec> specs;
  for (const std::string& name : base.Names()) {
    if (tied && name == "lm_head.weight") continue;
    RF_ASSIGN_OR_RETURN(const at::Tensor tensor, base.Get(name));
    specs[name] = {.dtype = tensor.is_floating_point() ? at::kBFloat16 : tensor.scalar_type(), .shape = tensor.sizes().vec()};
  }
  RF_ASSIGN_OR_RETURN(const auto writer, checkpoint::SafetensorsWriter::Create(path, specs, {{"format", "pt"}}));
  for (const auto& [name, spec] : specs) {
    RF_ASSIGN_OR_RETURN(const at::Tensor tensor, MergedTensor(base, adapter, name));
    RF_RETURN_IF_ERROR(writer->Append({static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes()}));
  }
  return writer->Finish();
}

}  // namespace

Status ExportMergedFolder(const checkpoint::ModelFolder& base, const checkpoint::PeftAdapter& adapter, const ModelCard& card,
                          const std::filesystem::path& folder) {
  for (const auto& [module, pair] : adapter.pairs) {
    if (!base.Has(module + ".weight")) {
      return InvalidArgument("the adapter's module ", module, " is not in ", base.path().string(),
                             ": it was trained on another model");
    }
  }
  RF_RETURN_IF_ERROR(CreateFolders(folder));
  nlohmann::json config = base.config();
  config.erase("quantization_config");  // a GPTQ base opens dequantized
  const bool tied = config.value("tie_word_embeddings", false);
  RF_RETURN_IF_ERROR(WriteMergedWeights(base, adapter, tied, folder / "model.safetensors"));
  if (config.contains("dtype")) config["dtype"] = "bfloat16";
  if (config.contains("torch_dtype") || !config.contains("dtype")) config["torch_dtype"] = "bfloat16";
  RF_RETURN_IF_ERROR(WriteFileAtomically(folder / "config.json", config.dump(2) + "\n"));
  RF_RETURN_IF_ERROR(CopyCompanions(base.path(), folder));
  RF_RETURN_IF_ERROR(WriteModelCard(Kind::kMerged, card, {{"modules changed", Join(adapter.pairs.size())}}, folder));
  return WriteManifest(folder);
}

}  // namespace refinery::exporting
