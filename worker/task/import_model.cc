#include "common/files.h"
#include "worker/task/checkpoint/import.h"
#include "worker/task/model/config.h"
#include "worker/task/models.h"
#include "worker/task/quantize/model_quantizer.h"
#include "worker/task/tasks.h"

namespace refinery::task {
namespace {

// What would stop the job later is refused now: settings that do not fit the student, a teacher with another tokenizer.
Status CheckFits(const ImportModelSpec& spec, const TaskContext& context, const ResolvedModel& imported) {
  RF_ASSIGN_OR_RETURN(model::ModelConfig config, model::ModelConfig::FromJson(imported.folder->config()));
  if (spec.gptq.bits > 0) RF_RETURN_IF_ERROR(quantize::CheckGroupSize(config, spec.gptq.bits, spec.gptq.group_size));
  if (!context.HasInput("student")) return absl::OkStatus();
  RF_ASSIGN_OR_RETURN(ResolvedModel student, ResolveInput(context, "student"));
  return CheckSameTokenizer(imported, student);
}

}  // namespace

Status ImportModel(const ImportModelSpec& spec, TaskContext& context) {
  context.events.Report({.phase = "importing", .total = 1});
  RF_ASSIGN_OR_RETURN(checkpoint::ModelRef ref, checkpoint::ImportModel(spec.uri, context.cache));
  RF_ASSIGN_OR_RETURN(std::filesystem::path folder, checkpoint::ResolveModel(ref, context.cache));
  RF_ASSIGN_OR_RETURN(std::shared_ptr<checkpoint::ModelFolder> opened, checkpoint::ModelFolder::Open(folder));
  RF_RETURN_IF_ERROR(CheckFits(spec, context, {.ref = ref, .folder = opened}));
  RF_RETURN_IF_ERROR(WriteFileAtomically(context.outputs / "model_ref.json", checkpoint::ToJson(ref).dump(2) + "\n"));
  for (const char* name : {"config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"}) {
    if (!std::filesystem::exists(folder / name)) continue;
    RF_ASSIGN_OR_RETURN(std::string bytes, ReadFile(folder / name));
    RF_RETURN_IF_ERROR(WriteFileAtomically(context.outputs / name, bytes));
  }
  context.events.Measure({.name = "parameters", .value = static_cast<double>(ref.parameters), .count = 1});
  context.events.Report({.phase = "importing", .done = 1, .total = 1});
  return absl::OkStatus();
}

}  // namespace refinery::task
