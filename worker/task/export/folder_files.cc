#include "worker/task/runtime/torch.h"

#include "worker/task/export/folder_files.h"

#include <map>
#include <nlohmann/json.hpp>

#include "common/digest.h"
#include "common/files.h"
#include "worker/task/quantize/quantized_artifact.h"

namespace refinery::exporting {
namespace {

constexpr const char* kCompanions[] = {
    "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "tokenizer.model", "chat_template.jinja", "LICENSE"};
constexpr char kManifest[] = "manifest.json";

StatusOr<std::vector<FileEntry>> FilesWithoutManifest(const std::filesystem::path& folder) {
  RF_ASSIGN_OR_RETURN(std::vector<FileEntry> files, ListFolder(folder));
  std::erase_if(files, [](const FileEntry& file) { return file.path == kManifest; });
  std::sort(files.begin(), files.end(), [](const FileEntry& a, const FileEntry& b) { return a.path < b.path; });
  return files;
}

StatusOr<std::vector<FileEntry>> ReadManifest(const std::filesystem::path& path) try {
  RF_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  const nlohmann::json manifest = nlohmann::json::parse(text);
  std::vector<FileEntry> files;
  for (const auto& file : manifest.at("files")) {
    files.push_back({file.at("path"), file.at("digest"), file.at("size")});
  }
  return files;
} catch (const nlohmann::json::exception& e) {
  return DataLoss(path.string(), ": ", e.what());
}

// One cell of a Markdown table.
std::string Cell(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '|') out += '\\';
    out += c == '\n' ? ' ' : c;
  }
  return out;
}

std::string Table(const std::string& left, const std::string& right,
                  const std::vector<std::pair<std::string, std::string>>& rows) {
  std::string out = Join("| ", left, " | ", right, " |\n|---|---|\n");
  for (const auto& [name, value] : rows) out += Join("| ", Cell(name), " | ", Cell(value), " |\n");
  return out;
}

// Front matter values come from recipes: as JSON strings they are valid YAML whatever they hold.
std::string Quoted(const std::string& text) { return nlohmann::json(text).dump(); }

const char* Tag(Kind kind) {
  switch (kind) {
    case Kind::kGptq: return "gptq, ";
    case Kind::kCompressedTensors: return "compressed-tensors, ";
    case Kind::kGguf: return "gguf, ";
    case Kind::kAdapter: return "lora, ";
    case Kind::kMerged: return "";
  }
  return "";
}

std::string FrontMatter(Kind kind, const ModelCard& card) {
  std::string out = "---\n";
  if (!card.base_model.empty()) out += Join("base_model: ", Quoted(card.base_model), "\n");
  if (!card.license.empty()) out += Join("license: ", Quoted(card.license), "\n");
  if (kind != Kind::kGguf) out += kind == Kind::kAdapter ? "library_name: peft\n" : "library_name: transformers\n";
  out += Join("tags: [", Tag(kind), "refinery]\n");
  return out + "pipeline_tag: text-generation\n---\n\n";
}

std::string Introduction(Kind kind, bool mixed) {
  switch (kind) {
    case Kind::kGptq:
      if (mixed)
        return "Weights quantized with GPTQ (HF GPTQ checkpoint), its layers with widths of their own. Load it with GPTQModel:\n\n"
               "```python\nfrom gptqmodel import GPTQModel\nmodel = GPTQModel.load(folder)\n```\n";
      return "Weights quantized with GPTQ (HF GPTQ checkpoint). Load it with transformers and gptqmodel installed:\n\n"
             "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
             "model = AutoModelForCausalLM.from_pretrained(folder)\ntokenizer = AutoTokenizer.from_pretrained(folder)\n```\n";
    case Kind::kCompressedTensors:
      return "Weights quantized with GPTQ, packed by compressed-tensors (pack-quantized). Load it with transformers and "
             "compressed-tensors installed, or with vLLM:\n\n"
             "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
             "model = AutoModelForCausalLM.from_pretrained(folder)\ntokenizer = AutoTokenizer.from_pretrained(folder)\n```\n";
    case Kind::kGguf:
      return "Weights quantized with GPTQ: the same integer codes as in the other folders, as blocks of ggml where there are blocks that hold "
             "them. Run it with llama.cpp:\n\n```sh\nllama-cli -m model.gguf\n```\n";
    case Kind::kAdapter:
      return "A LoRA adapter. Load it with peft:\n\n"
             "```python\nfrom peft import PeftModel\nmodel = PeftModel.from_pretrained(base_model, folder)\n```\n";
    case Kind::kMerged:
      return "The base model with its adapter merged in: computed in float32, rounded once to bfloat16.\n\n"
             "```python\nfrom transformers import AutoModelForCausalLM\n"
             "model = AutoModelForCausalLM.from_pretrained(folder)\n```\n";
  }
  return "";
}

double MeanError(const quantize::QuantizedModel& quantized, double quantize::GptqReport::* error) {
  double sum = 0;
  for (const auto& [module, report] : quantized.reports) sum += report.*error;
  return quantized.reports.empty() ? 0 : sum / static_cast<double>(quantized.reports.size());
}

std::string Percent(double fraction) {
  char text[32];
  std::snprintf(text, sizeof text, "%.3f %%", 100 * fraction);
  return text;
}

}  // namespace

Status CopyCompanions(const std::filesystem::path& base, const std::filesystem::path& folder) {
  for (const char* name : kCompanions) {
    std::error_code error;
    if (!std::filesystem::is_regular_file(base / name, error)) continue;
    RF_ASSIGN_OR_RETURN(const std::string bytes, ReadFile(base / name));
    RF_RETURN_IF_ERROR(WriteFileAtomically(folder / name, bytes));
  }
  return absl::OkStatus();
}

Status WriteModelCard(Kind kind, const ModelCard& card, const std::vector<std::pair<std::string, std::string>>& facts,
                      const std::filesystem::path& folder, bool mixed) {
  std::string text = FrontMatter(kind, card);
  text += Join("# ", card.name.empty() ? "Refined model" : Cell(card.name), "\n\n", Introduction(kind, mixed), "\n");
  if (!facts.empty()) text += Join("## Facts\n\n", Table("What", "Value", facts), "\n");
  if (!card.measurements.empty()) text += Join("## Measurements\n\n", Table("Measurement", "Value", card.measurements), "\n");
  if (!card.recipe.empty()) {
    // A fence longer than any run of backticks inside.
    std::string fence = "```";
    while (card.recipe.find(fence) != std::string::npos) fence += '`';
    text += Join("## Recipe\n\n", fence, "yaml\n", card.recipe, card.recipe.back() == '\n' ? "" : "\n", fence, "\n\n");
  }
  text += Join("Made by Refinery ", REFINERY_VERSION, "; `manifest.json` holds the SHA-256 of every file.\n");
  return WriteFileAtomically(folder / "README.md", text);
}

std::vector<std::pair<std::string, std::string>> QuantizedFacts(const quantize::QuantizedModel& quantized) {
  const quantize::GptqSettings& s = quantized.settings;
  std::map<int64_t, int64_t> layers;
  for (const auto& [module, linear] : quantized.linears) ++layers[linear.bits];
  std::string bits;
  for (const auto& [width, count] : layers)
    bits += Join(bits.empty() ? "" : ", ", width, layers.size() == 1 ? "" : Join(" (", count, " linear layers)"));
  std::vector<std::pair<std::string, std::string>> facts = {{"bits", bits},
                 {"group size", s.group_size == -1 ? "one group a row" : Join(s.group_size)},
                 {"quantized weights", Join(quantize::QuantizedBytes(quantized), " bytes")}};
  if (quantized.calibration_tokens > 0) {
    facts.emplace_back("calibration tokens", Join(quantized.calibration_tokens));
    facts.emplace_back("mean output error of a layer", Percent(MeanError(quantized, &quantize::GptqReport::relative_error)));
    facts.emplace_back("the same with plain rounding",
                       Percent(MeanError(quantized, &quantize::GptqReport::rtn_relative_error)));
  }
  return facts;
}

nlohmann::json Provenance(const quantize::QuantizedModel& quantized) {
  nlohmann::json facts = {{"quantizer", {Join("refinery:", REFINERY_VERSION)}},
                          {"settings", quantize::SettingsToJson(quantized.settings)},
                          {"calibration_digest", quantized.calibration_digest},
                          {"calibration_tokens", quantized.calibration_tokens}};
  if (quantized.calibration_facts.is_object() && !quantized.calibration_facts.empty()) facts["calibration"] = quantized.calibration_facts;
  if (quantized.budget.is_object()) {
    facts["budget"] = quantized.budget;
    for (const auto& [module, linear] : quantized.linears) facts["bits_by_module"][module] = linear.bits;
  }
  if (quantized.recovery.is_object()) facts["recovery"] = quantized.recovery;
  return facts;
}

Status WriteManifest(const std::filesystem::path& folder, const ModelBytes* bytes) {
  RF_ASSIGN_OR_RETURN(const std::vector<FileEntry> files, FilesWithoutManifest(folder));
  nlohmann::json entries = nlohmann::json::array();
  for (const FileEntry& file : files) entries.push_back({{"path", file.path}, {"digest", file.digest}, {"size", file.size}});
  nlohmann::json manifest = {{"format", 1}, {"files", entries}};
  if (bytes != nullptr) {
    manifest["bytes"] = {{"model", bytes->model}, {"without_embeddings", bytes->without_embeddings}, {"linear", bytes->linear},
                         {"linear_bf16", bytes->linear_bf16}, {"linear_ratio", bytes->linear_ratio()}};
  }
  return WriteFileAtomically(folder / kManifest, manifest.dump(1) + "\n");
}

StatusOr<ModelBytes> BytesOf(const std::filesystem::path& folder) try {
  RF_ASSIGN_OR_RETURN(const std::string text, ReadFile(folder / kManifest));
  const nlohmann::json bytes = nlohmann::json::parse(text).at("bytes");
  return ModelBytes{.model = bytes.at("model"), .without_embeddings = bytes.at("without_embeddings"), .linear = bytes.at("linear"),
                    .linear_bf16 = bytes.at("linear_bf16")};
} catch (const nlohmann::json::exception& e) {
  return DataLoss((folder / kManifest).string(), ": ", e.what());
}

Status CheckManifest(const std::filesystem::path& folder) {
  RF_ASSIGN_OR_RETURN(std::vector<FileEntry> wanted, ReadManifest(folder / kManifest));
  RF_ASSIGN_OR_RETURN(const std::vector<FileEntry> found, FilesWithoutManifest(folder));
  size_t next = 0;
  for (const FileEntry& file : wanted) {
    if (next < found.size() && found[next].path < file.path) return DataLoss(found[next].path, ": not in the manifest");
    if (next == found.size() || found[next].path != file.path) return DataLoss(file.path, ": in the manifest, but missing");
    if (found[next].digest != file.digest || found[next].size != file.size) {
      return DataLoss(file.path, ": differs from the manifest (", found[next].digest, ", not ", file.digest, ")");
    }
    ++next;
  }
  if (next < found.size()) return DataLoss(found[next].path, ": not in the manifest");
  return absl::OkStatus();
}

}  // namespace refinery::exporting
