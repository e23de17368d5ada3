#include "worker/task/runtime/torch.h"

#include <malloc.h>

#include <cstdio>

#include "common/digest.h"
#include "common/files.h"
#include "worker/task/calibration.h"
#include "worker/task/models.h"
#include "worker/task/quality_gate.h"
#include "worker/task/quantize/mixed_bits.h"
#include "worker/task/quantize/model_quantizer.h"
#include "worker/task/quantize/quantize_plan.h"
#include "worker/task/quantize/quantized_artifact.h"
#include "worker/task/size_budget.h"
#include "worker/task/tasks.h"

namespace refinery::task {
namespace {

constexpr int kCodeVersion = 2;  // of the quantizer: rises when the same inputs would give other codes
constexpr char kBitsFact[] = "bits_by_module";

StatusOr<quantize::GptqSettings> SettingsOf(const GptqSpec& spec) {
  quantize::GptqSettings settings{.bits = spec.bits, .group_size = spec.group_size, .damp_fraction = spec.damp_fraction};
  const auto grid = quantize::GridFromName(spec.grid.empty() ? "full_range" : spec.grid);
  if (!grid) return InvalidArgument("unknown grid '", spec.grid, "': full_range, symmetric or asymmetric");
  const auto order = quantize::OrderFromName(spec.order.empty() ? "groups" : spec.order);
  if (!order) return InvalidArgument("unknown order '", spec.order, "': groups, natural or classic");
  settings.grid = *grid;
  settings.order = *order;
  settings.alpha = spec.alpha;
  return settings;
}

// The only file of the input "general".
StatusOr<std::vector<std::string>> GeneralText(const TaskContext& context) {
  RF_ASSIGN_OR_RETURN(const std::filesystem::path folder, context.Input("general"));
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.is_regular_file()) return ReadDocuments(entry.path());
  }
  return NotFound("input 'general' holds no file");
}

// From the train split: recovery is judged on the validation split, gates on the held-out one.
StatusOr<Calibration> Calibrate(const GptqSpec& spec, const tokenizer::Tokenizer& tokenizer, TaskContext& context, nlohmann::json* facts) {
  RF_ASSIGN_OR_RETURN(const std::vector<data::Example> examples, data::ReadExamples(context.inputs / "examples" / "train.jsonl"));
  CalibrationRequest request{.examples = &examples, .general_share = spec.general_share, .tokens = spec.calibration_tokens,
                             .sequence_length = spec.sequence_length, .seed = spec.calibration_seed};
  if (spec.duplicate_threshold > 0) request.duplicate_threshold = spec.duplicate_threshold;
  if (spec.general_share > 0) {
    RF_ASSIGN_OR_RETURN(request.general, GeneralText(context));
  }
  RF_ASSIGN_OR_RETURN(Calibration calibration, MakeCalibration(request, tokenizer));
  *facts = calibration.Facts(request);
  const auto note = [&](const char* what, const CalibrationSource& source) {
    if (source.passes > 1)
      context.events.Note("calibration_repeats", Join("the ", source.documents, " ", what, " were shown ", source.passes,
                                                      " times to fill ", source.windows, " windows of ", spec.sequence_length, " tokens"));
  };
  note("curated examples", calibration.examples);
  note("documents of general text", calibration.general);
  context.events.Measure({.name = "calibration_tokens", .value = static_cast<double>(calibration.tokens),
                          .count = calibration.sequences.size(), .unit = "tokens"});
  context.events.Measure({.name = "calibration_vocabulary", .value = calibration.vocabulary_share,
                          .count = static_cast<uint64_t>(calibration.distinct_ids), .unit = "share"});
  return calibration;
}

// Everything that the codes depend on.
StatusOr<nlohmann::json> Fingerprint(const GptqSpec& spec, const std::vector<std::string>& formats, const quantize::GptqSettings& settings, const ResolvedModel& student,
                                     const Calibration& calibration, const TaskContext& context) {
  std::string adapter;
  if (context.HasInput("adapter")) {
    RF_ASSIGN_OR_RETURN(const std::vector<FileEntry> files, ListFolder(context.inputs / "adapter"));
    adapter = DigestOf(ManifestText(files));
  }
  return nlohmann::json{{"weights", student.ref.digest},
                        {"adapter", adapter},
                        {"calibration", quantize::CalibrationDigest(calibration.sequences)},
                        {"settings", quantize::SettingsToJson(settings)},
                        {"bits_budget", spec.bits_budget},
                        {"bytes_budget", spec.bytes_budget},
                        {"widths", spec.widths},
                        {"formats", formats},
                        {"code", Join(REFINERY_VERSION, "/", kCodeVersion)}};
}

// Whether a journal's fact gives every module one of the widths.
bool HasWidths(const nlohmann::json& kept, const model::ModelConfig& config, const std::vector<int64_t>& widths) {
  if (!kept.is_object()) return false;
  for (const quantize::ModuleSize& size : quantize::ModuleSizes(config)) {
    for (int64_t layer = 0; layer < config.num_layers; ++layer) {
      const auto found = kept.find(quantize::ModuleName(layer, size));
      if (found == kept.end() || std::find(widths.begin(), widths.end(), *found) == widths.end()) return false;
    }
  }
  return true;
}

// Bits by module under a budget; measured once and kept in the journal.
StatusOr<std::map<std::string, int64_t>> AllotModules(const QuantizeSpec& task, const quantize::GptqSettings& settings,
                                                      const StreamedModel& model, const Calibration& calibration,
                                                      quantize::Journal& journal, TaskContext& context) {
  const GptqSpec& spec = task.gptq;
  std::map<std::string, int64_t> bits;
  const nlohmann::json kept = journal.ReadFact(kBitsFact);
  if (HasWidths(kept, model.lm->config(), spec.widths)) return kept.get<std::map<std::string, int64_t>>();
  quantize::TokenSequences probe;
  int64_t tokens = 0;
  for (const std::vector<int32_t>& sequence : calibration.sequences) {
    if (tokens >= quantize::kWidthTokens) break;
    probe.ids.push_back(sequence);
    tokens += static_cast<int64_t>(sequence.size());
  }
  RF_ASSIGN_OR_RETURN(const quantize::SizeOf stored, StoredSize(spec, task.formats));
  RF_ASSIGN_OR_RETURN(const std::vector<quantize::BitsGroup> groups,
                      quantize::MeasureBits(*model.lm, model.layer, probe, settings, spec.widths, context.events, stored));
  const int64_t budget = quantize::BudgetBytes(groups, BudgetOf(spec));
  RF_ASSIGN_OR_RETURN(const std::vector<size_t> chosen, quantize::AllotBits(groups, budget));
  bits = quantize::BitsByModule(groups, chosen);
  std::map<int64_t, int64_t> weights;
  int64_t bytes = 0;
  for (size_t g = 0; g < groups.size(); ++g) {
    weights[groups[g].options[chosen[g]].bits] += groups[g].weights;
    bytes += groups[g].options[chosen[g]].bytes;
  }
  std::string text;
  for (const auto& [width, count] : weights) text += Join(text.empty() ? "" : ", ", width, " bits: ", count, " weights");
  context.events.Note("mixed_bits", Join(text, "; ", bytes, " of ", budget, " bytes"));
  RF_RETURN_IF_ERROR(journal.WriteFact(kBitsFact, bits));
  return bits;
}

// The width of most weights: what loaders are told of the whole, beside the layers that differ.
int64_t CommonWidth(const model::ModelConfig& config, const std::map<std::string, int64_t>& bits) {
  std::map<int64_t, int64_t> weights;
  for (const quantize::ModuleSize& size : quantize::ModuleSizes(config)) {
    for (int64_t layer = 0; layer < config.num_layers; ++layer) weights[bits.at(quantize::ModuleName(layer, size))] += size.in * size.out;
  }
  return std::max_element(weights.begin(), weights.end(), [](const auto& a, const auto& b) { return a.second < b.second; })->first;
}

void MeasureErrors(const quantize::QuantizedModel& quantized, TaskContext& context) {
  double worst = 0, sum = 0, rounding = 0;
  std::string worst_module;
  int64_t fallbacks = 0;
  for (const auto& [module, report] : quantized.reports) {
    if (report.relative_error > worst) worst_module = module;
    worst = std::max(worst, report.relative_error);
    sum += report.relative_error;
    rounding += report.rtn_relative_error;
    fallbacks += report.notes.empty() ? 0 : 1;
  }
  const auto modules = static_cast<double>(quantized.reports.size());
  const auto measure = [&](const char* name, double value, const char* unit = "") {
    context.events.Measure({.name = name, .value = value, .count = quantized.reports.size(), .unit = unit});
  };
  measure("relative_error", sum / modules);
  measure("relative_error_rounding", rounding / modules);
  measure("relative_error_worst", worst);
  measure("fallbacks", static_cast<double>(fallbacks));
  const quantize::QuantizeTimes& t = quantized.times;
  measure("forward_seconds", t.forward_seconds, "s");
  measure("hessian_seconds", t.hessian_seconds, "s");
  measure("solve_seconds", t.solve_seconds, "s");
  measure("journal_seconds", t.journal_seconds, "s");
  std::fprintf(stderr, "worst module %s: relative error %.5f\n", worst_module.c_str(), worst);
  for (const auto& [module, seconds] : t.module_seconds) {
    const quantize::GptqReport& report = quantized.reports.at(module);
    std::fprintf(stderr, "%-40s error %.5f, rounded %.5f, damping %.3g, %.2f s\n", module.c_str(), report.relative_error,
                 report.rtn_relative_error, report.damp_fraction, seconds);
  }
}

void ReportHeldOut(const quantize::HeldOutFigures& figures, TaskContext& context) {
  const auto measure = [&](const char* name, double value, const char* unit) {
    context.events.Measure({.name = name, .value = value, .count = static_cast<uint64_t>(figures.tokens), .unit = unit});
  };
  measure("source_perplexity", figures.source_perplexity, "");
  measure("quantized_perplexity", figures.quantized_perplexity, "");
  measure("rounded_perplexity", figures.rounded_perplexity, "");
  measure("quantized_kl", figures.quantized_kl, "nats");
  measure("rounded_kl", figures.rounded_kl, "nats");
}

int64_t Tokens(const std::vector<std::vector<int32_t>>& sequences) {
  int64_t tokens = 0;
  for (const auto& sequence : sequences) tokens += static_cast<int64_t>(sequence.size());
  return tokens;
}

}  // namespace

Status Quantize(const QuantizeSpec& spec, TaskContext& context) {
  c10::InferenceMode inference;
  const GptqSpec& gptq = spec.gptq;
  RF_ASSIGN_OR_RETURN(quantize::GptqSettings settings, SettingsOf(gptq));
  RF_ASSIGN_OR_RETURN(ResolvedModel student, ResolveInput(context, "student"));
  RF_ASSIGN_OR_RETURN(auto tokenizer, tokenizer::Tokenizer::Load(student.folder->path()));
  RF_ASSIGN_OR_RETURN(const StreamedModel model, OpenStreamed(context, student));
  const model::ModelConfig& config = model.lm->config();
  RF_RETURN_IF_ERROR(quantize::CheckGroupSize(config, gptq.bits, gptq.group_size));
  if (const std::string ragged = quantize::RaggedGroupsNote(config, gptq.group_size); !ragged.empty())
    context.events.Note("ragged_groups", ragged);

  nlohmann::json facts;
  RF_ASSIGN_OR_RETURN(const Calibration calibration, Calibrate(gptq, *tokenizer, context, &facts));
  RF_ASSIGN_OR_RETURN(const quantize::TokenSequences held_out, HeldOutText(gptq.gate, *tokenizer, context));
  const quantize::PlanRequest request = PlanRequestOf(gptq, calibration.tokens, Tokens(held_out.ids));
  RF_ASSIGN_OR_RETURN(const quantize::QuantizePlan plan,
                      quantize::MakePlan(config, request, gptq.memory_mib << 20, quantize::MeasureRates()));
  context.events.Note("quantize_plan", plan.Text());

  ::malloc_trim(0);  // what tokenizing and measuring took

  RF_ASSIGN_OR_RETURN(const nlohmann::json fingerprint, Fingerprint(gptq, spec.formats, settings, student, calibration, context));
  const bool checkpoints = !context.checkpoints.empty();
  const std::filesystem::path folder = checkpoints ? context.checkpoints / "journal" : context.outputs / ".journal";
  RF_ASSIGN_OR_RETURN(quantize::Journal journal, quantize::Journal::Open(folder, fingerprint, context.events));
  if (!context.resume.empty()) RF_RETURN_IF_ERROR(journal.Adopt(context.resume, context.events));
  if (!journal.modules().empty())
    context.events.Note("resumed", Join(journal.modules().size(), " modules were quantized before this attempt"));

  quantize::QuantizeOptions options{.layers = model.layer, .journal = &journal, .keep_inputs = plan.keep_inputs};
  if (!held_out.ids.empty()) options.held_out = &held_out;
  if (checkpoints) {
    options.publish = [&](int64_t modules) -> Status {
      const std::string name = Join("modules-", modules);
      RF_RETURN_IF_ERROR(journal.Publish(name));
      context.events.CheckpointReady(name, static_cast<uint64_t>(modules));
      return absl::OkStatus();
    };
  }
  if (gptq.HasBudget()) {
    RF_ASSIGN_OR_RETURN(options.bits, AllotModules(spec, settings, model, calibration, journal, context));
    settings.bits = CommonWidth(config, options.bits);
    // What was measured need not be measured again elsewhere.
    if (checkpoints && journal.modules().empty()) RF_RETURN_IF_ERROR(options.publish(0));
  }
  RF_ASSIGN_OR_RETURN(quantize::QuantizedModel quantized,
                      quantize::QuantizeModel(*model.lm, {.ids = calibration.sequences, .weights = {}}, settings, options, context.events));
  quantized.calibration_facts = std::move(facts);
  if (gptq.HasBudget()) {
    quantized.budget = {{"widths", gptq.widths}, {"formats", spec.formats}};
    quantized.budget[gptq.bytes_budget > 0 ? "bytes" : "bits_per_weight"] = gptq.bytes_budget > 0 ? nlohmann::json(gptq.bytes_budget) : nlohmann::json(gptq.bits_budget);
  }
  MeasureErrors(quantized, context);
  if (quantized.held_out && quantized.held_out->tokens > 0) {
    ReportHeldOut(*quantized.held_out, context);
    RF_RETURN_IF_ERROR(CheckGate(gptq.gate, quantized.held_out->Quantized(), "quantized"));
  }
  RF_RETURN_IF_ERROR(quantize::SaveQuantized(quantized, journal, context.outputs, context.events));
  std::error_code error;
  if (!checkpoints) std::filesystem::remove_all(folder, error);
  return absl::OkStatus();
}

}  // namespace refinery::task
