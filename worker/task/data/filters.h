// worker/task/data/filters.h
//
// From raw, scored examples to train, validation and held-out sets, with a ledger that says for every raw example where it
// went and why. Nothing is dropped silently.
//
// Order of the checks (the first that fails is the reason):
//   what generation refused (extra.rejected) -> holds a benchmark item -> judged too low (extra.judge.keep == false)
//   -> same question or same question and answer as an earlier one -> too close to a seed or an earlier one (ROUGE-L)
//   -> near-duplicate (MinHash).
// "Earlier" means: kept, with a smaller index.  Deterministic in (examples, seeds, settings).

#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "worker/task/data/benchmark.h"
#include "worker/task/data/example.h"
#include "worker/task/data/task_format.h"

namespace refinery::data {

struct CurateSettings {
  double validation_fraction = 0.15;
  double held_out_fraction = 0.15;
  double novelty_threshold = 0.7;    // ROUGE-L of the questions above which one repeats the other; 1 = off
  double duplicate_threshold = 0.7;  // MinHash similarity of question + answer from which one is a duplicate
  size_t seed_examples = 0;          // seeds that join the train split as they are
  uint64_t seed = 0;                 // of the split
};

struct LedgerRow {
  int64_t index = 0;        // into the raw examples; -1 - i for seed i
  std::string reason;       // empty for kept ones, else one stable word
  std::string detail;
  std::string kept_as;      // "train", "validation", "held_out" or empty
};
nlohmann::json ToJson(const LedgerRow& row);
Status WriteLedger(const std::filesystem::path& jsonl, const std::vector<LedgerRow>& ledger);

struct Curated {
  std::vector<Example> train, validation, held_out;
  std::vector<LedgerRow> ledger;                 // one row per raw example in order, then the seeds that joined
  std::map<std::string, int64_t> counts;         // "raw", "kept", "train", ..., and one per reason
};

// INVALID_ARGUMENT for fractions outside [0, 1), thresholds outside (0, 1], or when a wanted split would stay empty (names
// the most frequent reason). `benchmark` holds the items to keep out; it may be empty.
StatusOr<Curated> Curate(const TaskFormat& format, const std::vector<Example>& raw, const std::vector<Example>& seeds,
                         const std::vector<MultipleChoiceItem>& benchmark, const CurateSettings& settings);

}  // namespace refinery::data
