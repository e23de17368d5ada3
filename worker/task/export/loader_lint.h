// worker/task/export/loader_lint.h
//
// Says before any work starts which programs will load an exported model, why not, and the nearest settings that they take.
//
// Source: what transformers 5.23 (optimum 2.3, gptqmodel 7.7), compressed-tensors 0.20, vLLM (gptq_marlin and compressed-tensors as
// of 2026-08) and llama.cpp check when they load. A format that cannot hold the settings at all is refused (CheckFormat); a
// loader that will not take them is reported.
// Errors: INVALID_ARGUMENT naming the layer and the nearest legal settings.  Threads: functions. No LibTorch.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/model/config.h"

namespace refinery::exporting {

enum class Format { kGptq, kGptqV2, kCompressedTensors, kGguf };

// "gptq", "gptq_v2", "compressed_tensors", "gguf": as recipes name them. INVALID_ARGUMENT lists them.
std::string_view FormatName(Format format);
StatusOr<Format> FormatOf(std::string_view name);
StatusOr<std::vector<Format>> FormatsOf(const std::vector<std::string>& names);

struct QuantSettings {
  int64_t bits = 4;
  int64_t group_size = 64;        // -1 = one group a row
  bool symmetric = true;
  bool act_order = false;         // g_idx permuted
  std::vector<int64_t> mixed;     // further widths that layers may get; empty = all have `bits`
  bool head = false;              // lm_head quantized too
};

struct Verdict {
  Format format = Format::kGptq;
  std::string loader;             // "vLLM (Marlin)"
  bool accepts = false;
  std::string why;                // of a refusal, or a remark on an acceptance; may be empty
  std::string nearest;            // settings that this loader takes: "group size 32"; empty when it accepts or none is found
};

// One row per loader of each format.
std::vector<Verdict> LintLoaders(const model::ModelConfig& config, const QuantSettings& settings,
                                 const std::vector<Format>& formats);

// Whether the format can hold such a model at all.
Status CheckFormat(const model::ModelConfig& config, const QuantSettings& settings, Format format);

// Why codes do not stand in blocks of GGUF as they are, so that layers stand there as 16-bit weights; empty if they do.
std::string GgufBlockProblem(const QuantSettings& settings);

// The verdicts as an aligned table for a terminal, ending with a line break.
std::string LintTable(const std::vector<Verdict>& verdicts);

}  // namespace refinery::exporting
