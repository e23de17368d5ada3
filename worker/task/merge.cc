#include "worker/task/runtime/torch.h"

#include "common/digest.h"
#include "common/files.h"
#include "worker/task/checkpoint/peft_adapter.h"
#include "worker/task/export/export.h"
#include "worker/task/models.h"
#include "worker/task/tasks.h"

namespace refinery::task {
namespace {

// Digest of the merged weights alone, so that every task that merges again can be compared with this one.
StatusOr<std::string> MergedDigest(const checkpoint::ModelFolder& base, const checkpoint::PeftAdapter& adapter) {
  Sha256 hash;
  for (const auto& [module, pair] : adapter.pairs) {
    RF_ASSIGN_OR_RETURN(at::Tensor weight, base.Get(module + ".weight"));
    at::Tensor merged = checkpoint::MergeLora(weight, pair, adapter.scale()).contiguous();
    hash.Update(module);
    hash.Update({static_cast<const char*>(merged.const_data_ptr()), merged.nbytes()});
  }
  return hash.Finish();
}

}  // namespace

Status Merge(const MergeSpec& spec, TaskContext& context) {
  RF_ASSIGN_OR_RETURN(ResolvedModel student, ResolveInput(context, "student"));
  RF_ASSIGN_OR_RETURN(std::filesystem::path input, context.Input("adapter"));
  RF_ASSIGN_OR_RETURN(checkpoint::PeftAdapter adapter, checkpoint::LoadPeftAdapter(input));
  RF_ASSIGN_OR_RETURN(std::string digest, MergedDigest(*student.folder, adapter));
  nlohmann::json facts = {{"base", student.ref.digest},
                          {"rank", adapter.rank},
                          {"lora_alpha", adapter.lora_alpha},
                          {"modules", adapter.pairs.size()},
                          {"merged_weights", digest}};
  RF_RETURN_IF_ERROR(WriteFileAtomically(context.outputs / "merged.json", facts.dump(2) + "\n"));
  if (spec.keep_model)
    RF_RETURN_IF_ERROR(exporting::ExportMergedFolder(*student.folder, adapter, {.name = context.job}, context.outputs / "model"));
  return absl::OkStatus();
}

}  // namespace refinery::task
