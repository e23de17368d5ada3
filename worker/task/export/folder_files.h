// worker/task/export/folder_files.h
//
// The files of an exported folder that do not hold weights: copies from the base folder, model card, manifest.

#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>

#include "common/status.h"
#include "worker/task/export/export.h"

namespace refinery::exporting {

// Copies tokenizer, chat template, generation settings and licence where `base` has them.
Status CopyCompanions(const std::filesystem::path& base, const std::filesystem::path& folder);

enum class Kind { kGptq, kCompressedTensors, kGguf, kAdapter, kMerged };
// README.md. `facts` are further rows of the table of facts; `mixed`: layers have widths of their own, which not every loader takes.
Status WriteModelCard(Kind kind, const ModelCard& card, const std::vector<std::pair<std::string, std::string>>& facts,
                      const std::filesystem::path& folder, bool mixed = false);
// Width, group size, bytes and errors of a quantized model, as rows of that table.
std::vector<std::pair<std::string, std::string>> QuantizedFacts(const quantize::QuantizedModel& quantized);

// Seeds, shares, settings and digests: what is needed, beside the model and the format's own settings, to make the same codes and scales
// again. `quantizer`, `settings`, `calibration_digest`, `calibration_tokens`, and `calibration` and `recovery` (docs/formats.md) where
// there are any.
nlohmann::json Provenance(const quantize::QuantizedModel& quantized);

}  // namespace refinery::exporting
