// worker/task/data/contamination.h
//
// Whether a training text holds a benchmark item. The share of the item's words that lie in word n-grams which also stand in
// the text: 8-grams and half of the item, or for items under 16 words 5-grams and 60 %; both for the bare question and for
// question + right answer. Items too short for n-grams count only when the text is the same after normalisation.
//
// Source: Tuelu 3 / open-instruct for n-gram coverage per test item; the rule for short items is ours (13-grams would miss
// most of PIQA, WinoGrande and CommonsenseQA).  Threads: Find is const and thread-safe.

#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "worker/task/data/benchmark.h"

namespace refinery::data {

struct ContaminationMatch {
  size_t item = 0;        // index in the order of Add
  double coverage = 0;    // of the item's words
  std::string what;       // "exact", "8-gram", "5-gram"
};

class ContaminationIndex {
 public:
  void Add(const MultipleChoiceItem& item);
  size_t size() const { return items_; }
  // The item that `question` + `answer` covers most, if any reaches its limit.
  std::optional<ContaminationMatch> Find(std::string_view question, std::string_view answer) const;

 private:
  struct Text {
    size_t item = 0;
    size_t words = 0;
    size_t n = 0;         // 8 or 5
    double limit = 0;
  };
  struct Place {
    size_t text = 0;
    size_t at = 0;
  };
  void AddText(std::string_view text, size_t item);

  size_t items_ = 0;
  std::vector<Text> texts_;
  std::unordered_multimap<uint64_t, Place> grams_;      // hash of the n words -> where
  std::unordered_map<std::string, size_t> exact_;       // normalised text -> item
};

}  // namespace refinery::data
