// worker/task/lint_command.h
//
// `refinery lint`: which programs will load a quantized model, before any work. Reads config.json (of a GGUF file its metadata) and
// the tokenizer, never weights. The client starts it as `refinery-task lint`.
//
// Standard output carries the table (or JSON) and nothing else.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/status.h"

namespace refinery::task {

struct LintOptions {
  std::string model;                // HF folder or GGUF file
  int64_t bits = 4;
  int64_t group_size = 64;          // -1 = one group a row
  std::string grid = "full_range";  // words of recipe.proto
  std::string order = "groups";
  std::vector<int64_t> mixed;       // widths of single layers
  bool head = false;                // lm_head quantized too
  std::vector<std::string> formats = {"gptq", "gptq_v2", "compressed_tensors", "gguf"};
  std::string output = "text";      // or "json"
};

// Whether every format can hold such a model.
StatusOr<bool> RunLintCommand(const LintOptions& options);

}  // namespace refinery::task
