#include "worker/task/runtime/torch.h"

#include "worker/task/quality_gate.h"

#include <algorithm>
#include <filesystem>

#include "worker/task/calibration.h"
#include "worker/task/data/example.h"

namespace refinery::task {
namespace {

constexpr char kFix[] = "; give more bits (or a larger budget), a smaller group_size or more calibration_tokens, or a wider bound";

}  // namespace

StatusOr<quantize::TokenSequences> HeldOutText(const GateSpec& gate, const tokenizer::Tokenizer& tokenizer, const TaskContext& context) {
  quantize::TokenSequences sequences;
  const std::filesystem::path file = context.inputs / "examples" / "held_out.jsonl";
  std::error_code error;
  if (gate.held_out_tokens >= 2 && std::filesystem::exists(file, error)) {
    RF_ASSIGN_OR_RETURN(const std::vector<data::Example> examples, data::ReadExamples(file));
    int64_t tokens = 0;
    for (const data::Example& example : examples) {
      if (tokens >= gate.held_out_tokens) break;
      RF_ASSIGN_OR_RETURN(std::vector<int32_t> ids, tokenizer.Encode(ExampleText(example)));
      if (ids.size() < 2) continue;
      if (static_cast<int64_t>(ids.size()) > gate.sequence_length) ids.resize(static_cast<size_t>(std::max<int64_t>(2, gate.sequence_length)));
      tokens += static_cast<int64_t>(ids.size());
      sequences.ids.push_back(std::move(ids));
    }
  }
  if (sequences.ids.empty() && (gate.max_kl > 0 || gate.max_ppl_ratio > 0)) {
    return FailedPrecondition("quantize.gptq has a gate (max_kl or max_ppl_ratio), but there is no held-out text to measure on: "
                              "raise data.curate.held_out_fraction or data.synthesize.examples");
  }
  return sequences;
}

Status CheckGate(const GateSpec& gate, const quantize::Fidelity& figures, const char* what) {
  if (gate.max_kl > 0 && !(figures.kl <= gate.max_kl)) {
    return FailedPrecondition("the ", what, " model's KL to the unquantized one is ", figures.kl, " nats on ", figures.tokens,
                              " held-out tokens, above quantize.gptq.max_kl ", gate.max_kl, kFix);
  }
  if (gate.max_ppl_ratio > 0 && !(figures.ratio() <= gate.max_ppl_ratio)) {
    return FailedPrecondition("the ", what, " model's perplexity is ", figures.ratio(), " times the unquantized one's (",
                              figures.perplexity, " and ", figures.source_perplexity, " on ", figures.tokens,
                              " held-out tokens), above quantize.gptq.max_ppl_ratio ", gate.max_ppl_ratio, kFix);
  }
  return absl::OkStatus();
}

}  // namespace refinery::task
