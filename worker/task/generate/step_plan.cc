#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <algorithm>

#include "worker/task/generate/step_plan.h"

namespace refinery::generate {
namespace {

Run RunOf(const Work& work, int64_t count) { return {work.slot, work.start, count, work.start + count == work.total}; }

}  // namespace

std::vector<PlannedStep> PlanMixed(const std::vector<Work>& work, int64_t max_tokens) {
  PlannedStep step;
  int64_t room = max_tokens;
  for (const Work& w : work) room -= w.total - w.start == 1;  // those that decode never wait for others' prompts
  for (const Work& w : work) {
    const int64_t left = w.total - w.start;
    // The first prompt advances even where decoding has taken all the room.
    const int64_t count = left == 1 ? 1 : std::min(left, step.runs.empty() ? std::max<int64_t>(1, room) : room);
    if (count <= 0) continue;
    if (left > 1) room -= count;
    step.runs.push_back(RunOf(w, count));
  }
  if (step.runs.empty()) return {};
  return {std::move(step)};
}

std::vector<PlannedStep> PlanFixed(const std::vector<Work>& work, int64_t max_tokens, const Forward& forward) {
  std::vector<PlannedStep> steps;
  for (const StepKind kind : {StepKind::kDecode, StepKind::kPrompt}) {
    const bool together = forward.RowInvariant(kind);
    bool open = false;
    int64_t tokens = 0;
    for (const Work& w : work) {
      if ((w.start < w.prompt) != (kind == StepKind::kPrompt)) continue;
      const int64_t count = w.start < w.prompt ? std::min(kFixedPiece - w.start % kFixedPiece, w.prompt - w.start) : 1;
      if (!open || !together || (kind == StepKind::kPrompt && tokens + count > max_tokens)) {
        steps.emplace_back().kind = kind;
        tokens = 0;
      }
      open = true;
      tokens += count;
      steps.back().runs.push_back(RunOf(w, count));
    }
  }
  return steps;
}

}  // namespace refinery::generate
