#include <algorithm>

#include "common/files.h"
#include "worker/task/checkpoint/import.h"
#include "worker/task/export/gguf_vocabulary.h"
#include "worker/task/export/loader_lint.h"
#include "worker/task/model/config.h"
#include "worker/task/models.h"
#include "worker/task/quantize/mixed_bits.h"
#include "worker/task/quantize/model_quantizer.h"
#include "worker/task/quantize/quantize_plan.h"
#include "worker/task/size_budget.h"
#include "worker/task/tasks.h"

namespace refinery::task {
namespace {

// Formats that cannot hold the settings, or the tokenizer, are refused; loaders that will not take them are noted.
Status Lint(const ImportModelSpec& spec, const TaskContext& context, const ResolvedModel& imported, const model::ModelConfig& config) {
  RF_ASSIGN_OR_RETURN(const std::vector<exporting::Format> formats, exporting::FormatsOf(spec.formats));
  const exporting::QuantSettings settings = LoaderSettings(spec.gptq);
  for (const exporting::Format format : formats) {
    RF_RETURN_IF_ERROR(exporting::CheckFormat(config, settings, format));
    if (format != exporting::Format::kGguf) continue;
    RF_RETURN_IF_ERROR(exporting::GgufVocabulary(imported.folder->path(), config.vocab_size).status());
    if (const std::string problem = exporting::GgufBlockProblem(settings); !problem.empty())
      context.events.Note("gguf_plain_weights", Join("gguf: ", problem, ": no block type holds such layers, they stand there as 16-bit weights"));
  }
  for (const exporting::Verdict& verdict : exporting::LintLoaders(config, settings, formats)) {
    if (verdict.accepts) continue;
    context.events.Note("loader_refuses", Join(exporting::FormatName(verdict.format), ": ", verdict.loader, " will not load it: ", verdict.why,
                                               verdict.nearest.empty() ? "" : Join("; nearest: ", verdict.nearest)));
  }
  return absl::OkStatus();
}

// The bounds of size and memory that quantization could never keep to.
Status CheckBounds(const GptqSpec& gptq, const std::vector<std::string>& formats, const model::ModelConfig& config) {
  if (gptq.HasBudget()) {
    exporting::QuantSettings narrowest = LoaderSettings(gptq);
    narrowest.mixed.clear();
    const std::string problem = exporting::GgufBlockProblem(narrowest);
    if (!problem.empty() && std::find(formats.begin(), formats.end(), "gguf") != formats.end())
      return InvalidArgument("quantize.gptq has a size budget, but with ", problem, " every layer stands in gguf as 16-bit weights; leave gguf out "
                             "of export.formats, or take another quantize.gptq.order or group_size");
    RF_ASSIGN_OR_RETURN(const quantize::SizeOf bytes, StoredSize(gptq, formats));
    RF_RETURN_IF_ERROR(quantize::CheckBudget(config, bytes, gptq.widths, BudgetOf(gptq)));
  }
  if (gptq.memory_mib == 0) return absl::OkStatus();
  const quantize::PlanRequest request = PlanRequestOf(gptq, gptq.calibration_tokens, 0);
  return quantize::MakePlan(config, request, gptq.memory_mib << 20, {.forward = 1, .hessian = 1, .factor = 1, .columns = 1}).status();
}

// What would stop the job later is refused now: settings that do not fit the student, a teacher with another tokenizer.
Status CheckFits(const ImportModelSpec& spec, const TaskContext& context, const ResolvedModel& imported) {
  RF_ASSIGN_OR_RETURN(model::ModelConfig config, model::ModelConfig::FromJson(imported.folder->config()));
  if (spec.gptq.bits > 0) {
    RF_RETURN_IF_ERROR(quantize::CheckGroupSize(config, spec.gptq.bits, spec.gptq.group_size));
    RF_RETURN_IF_ERROR(Lint(spec, context, imported, config));
    RF_RETURN_IF_ERROR(CheckBounds(spec.gptq, spec.formats, config));
  }
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
