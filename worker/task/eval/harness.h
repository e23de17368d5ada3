// worker/task/eval/harness.h
//
// Which release of lm-evaluation-harness an evaluation follows. Scores of one model differ between releases where its tokenizer
// adds a BOS token: up to 0.4.9.1 the harness never let it, from 0.4.9.2 on the tokenizer's own rule holds (Llama 3 and Gemma
// add one, SmolLM2 and Qwen do not), except where the text begins with a BOS already. Everything else here is 0.4.13's.
//
// Threads: pure functions.

#pragma once

#include <string>

#include "common/status.h"

namespace refinery::eval {

struct Harness {
  std::string version = "0.4.13";
  bool special_tokens = true;       // the tokenizer's own BOS rule
};

// "0.4.9.1", "v0.4.13"; INVALID_ARGUMENT for anything that is not a release of the 0.4 series.
StatusOr<Harness> HarnessOf(const std::string& version);

}  // namespace refinery::eval
