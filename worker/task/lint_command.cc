#include "worker/task/lint_command.h"

#include "worker/task/runtime/torch.h"

#include <cstdio>
#include <nlohmann/json.hpp>

#include "common/files.h"
#include "worker/task/checkpoint/gguf_model.h"
#include "worker/task/export/gguf_vocabulary.h"
#include "worker/task/export/loader_lint.h"

namespace refinery::task {
namespace {

StatusOr<model::ModelConfig> ReadConfig(const std::filesystem::path& model) {
  std::error_code error;
  if (!std::filesystem::exists(model, error)) return NotFound("no such model: ", model.string());
  if (!std::filesystem::is_directory(model, error)) {
    RF_ASSIGN_OR_RETURN(const auto file, checkpoint::GgufFile::Open(model));
    RF_ASSIGN_OR_RETURN(const checkpoint::GgufModel described, checkpoint::DescribeGgufModel(*file));
    return model::ModelConfig::FromJson(described.config);
  }
  RF_ASSIGN_OR_RETURN(const std::string text, ReadFile(model / "config.json"));
  const nlohmann::json config = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!config.is_object()) return DataLoss((model / "config.json").string(), " is not a JSON object");
  return model::ModelConfig::FromJson(config);
}

nlohmann::json ToJson(const std::vector<exporting::Verdict>& verdicts) {
  nlohmann::json list = nlohmann::json::array();
  for (const exporting::Verdict& v : verdicts)
    list.push_back({{"format", exporting::FormatName(v.format)}, {"loader", v.loader}, {"loads", v.accepts}, {"why", v.why}, {"nearest", v.nearest}});
  return list;
}

// Settings that no model could have.
Status CheckOptions(const LintOptions& options) {
  std::vector<int64_t> widths = options.mixed;
  widths.insert(widths.begin(), options.bits);
  for (size_t i = 0; i < widths.size(); ++i) {
    const int64_t bits = widths[i];
    if (bits != 2 && bits != 3 && bits != 4 && bits != 8)
      return InvalidArgument(i == 0 ? "--bits" : "--mixed", " must be 2, 3, 4 or 8, is ", bits);
  }
  if (options.group_size != -1 && options.group_size <= 0)
    return InvalidArgument("--group-size must be > 0, or -1 for one group a row, is ", options.group_size);
  return absl::OkStatus();
}

}  // namespace

StatusOr<bool> RunLintCommand(const LintOptions& options) {
  RF_RETURN_IF_ERROR(CheckOptions(options));
  RF_ASSIGN_OR_RETURN(const model::ModelConfig config, ReadConfig(options.model));
  RF_ASSIGN_OR_RETURN(const std::vector<exporting::Format> formats, exporting::FormatsOf(options.formats));
  const exporting::QuantSettings settings{.bits = options.bits, .group_size = options.group_size, .symmetric = options.grid != "asymmetric",
                                          .act_order = options.order == "classic", .mixed = options.mixed, .head = options.head};
  std::vector<exporting::Verdict> verdicts = exporting::LintLoaders(config, settings, formats);
  bool fits = true;
  for (const exporting::Format format : formats) fits = fits && exporting::CheckFormat(config, settings, format).ok();
  std::error_code error;
  const bool folder = std::filesystem::is_regular_file(std::filesystem::path(options.model) / "tokenizer.json", error);
  for (exporting::Verdict& verdict : verdicts) {
    if (verdict.format != exporting::Format::kGguf || !verdict.accepts || !folder) continue;
    const Status tokenizer = exporting::GgufVocabulary(options.model, config.vocab_size).status();
    if (tokenizer.ok()) continue;
    verdict.accepts = fits = false;
    verdict.why = Message(tokenizer);
  }
  std::fputs((options.output == "json" ? ToJson(verdicts).dump(2) + "\n" : exporting::LintTable(verdicts)).c_str(), stdout);
  return fits;
}

}  // namespace refinery::task
