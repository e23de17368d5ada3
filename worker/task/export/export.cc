#include "worker/task/runtime/torch.h"

#include "worker/task/export/export.h"

#include "common/files.h"
#include "worker/task/export/folder_files.h"
#include "worker/task/export/parts.h"

namespace refinery::exporting {

Status ExportAdapterFolder(const checkpoint::PeftAdapter& adapter, const ModelCard& card, const std::filesystem::path& folder) {
  RF_RETURN_IF_ERROR(CreateFolders(folder));
  RF_RETURN_IF_ERROR(checkpoint::SavePeftAdapter(adapter, folder));
  RF_ASSIGN_OR_RETURN(const checkpoint::PeftAdapter read, checkpoint::LoadPeftAdapter(folder));
  if (read.pairs.size() != adapter.pairs.size() || read.scale() != adapter.scale()) {
    return DataLoss(folder.string(), ": the adapter does not read back as it was written");
  }
  for (const auto& [module, pair] : adapter.pairs) {
    const auto found = read.pairs.find(module);
    if (found == read.pairs.end() || !SameBytes(found->second.a, pair.a.to(at::kFloat).cpu()) ||
        !SameBytes(found->second.b, pair.b.to(at::kFloat).cpu())) {
      return DataLoss(folder.string(), ": ", module, " does not read back as it was written");
    }
  }
  const std::vector<std::pair<std::string, std::string>> facts = {{"rank", Join(adapter.rank)}, {"lora_alpha", Join(adapter.lora_alpha)},
      {"modules", Join(adapter.pairs.size())}};
  RF_RETURN_IF_ERROR(WriteModelCard(Kind::kAdapter, card, facts, folder));
  return WriteManifest(folder);
}

}  // namespace refinery::exporting
