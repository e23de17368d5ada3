// worker/task/generate/step_plan.h
//
// Which tokens the next forward passes compute.
//
// Threads: pure functions.

#pragma once

#include <cstdint>
#include <vector>

#include "worker/task/generate/forward.h"

namespace refinery::generate {

constexpr int64_t kFixedPiece = 256;  // deterministic: prompts are cut at multiples of this

// A sequence with something to compute: positions [start, total), of which those before `prompt` belong to the prompt. After the
// prompt one token at a time remains.
struct Work {
  int64_t slot = 0, start = 0, prompt = 0, total = 0;
};

// The runs of one forward pass.
struct PlannedStep {
  StepKind kind = StepKind::kAny;
  std::vector<Run> runs;
};

// One pass for all: the next token of each sequence that decodes, and of prompts as much as `max_tokens` leave room for.
std::vector<PlannedStep> PlanMixed(const std::vector<Work>& work, int64_t max_tokens);

// Decoding and prompts apart, prompts in pieces that end at multiples of kFixedPiece. Into one pass go only runs that the forward
// pass keeps apart to the last bit; so what is computed for a sequence does not depend on the others.
std::vector<PlannedStep> PlanFixed(const std::vector<Work>& work, int64_t max_tokens, const Forward& forward);

}  // namespace refinery::generate
