#include "worker/task/data/contamination.h"

#include <algorithm>
#include <map>

#include "worker/task/data/text.h"

namespace refinery::data {
namespace {

constexpr size_t kShortItem = 16;  // words

// Of words [at, at + n); n itself is part of it, so that 5- and 8-grams share a table.
uint64_t HashGram(const std::vector<std::string>& words, size_t at, size_t n) {
  uint64_t hash = 0xCBF29CE484222325 ^ n;
  for (size_t i = at; i < at + n; ++i) {
    for (const char c : words[i]) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001B3;
    hash = (hash ^ 0x20) * 0x100000001B3;
  }
  return hash;
}

}  // namespace

void ContaminationIndex::AddText(std::string_view text, size_t item) {
  const std::vector<std::string> words = Words(text);
  if (words.empty()) return;
  exact_.emplace(Normalized(text), item);
  const bool is_short = words.size() < kShortItem;
  const Text entry{.item = item, .words = words.size(), .n = is_short ? 5U : 8U, .limit = is_short ? 0.6 : 0.5};
  if (words.size() < entry.n) return;
  for (size_t at = 0; at + entry.n <= words.size(); ++at) {
    grams_.emplace(HashGram(words, at, entry.n), Place{.text = texts_.size(), .at = at});
  }
  texts_.push_back(entry);
}

void ContaminationIndex::Add(const MultipleChoiceItem& item) {
  // In winogrande the question already holds the right name; what follows the gap completes the sentence.
  const size_t right = static_cast<size_t>(item.gold);
  const std::string& answer = item.bodies.size() == 1 ? item.answers.at(right) : item.continuations.at(right);
  AddText(item.question, items_);
  AddText(Join(item.question, " ", answer), items_);
  ++items_;
}

std::optional<ContaminationMatch> ContaminationIndex::Find(std::string_view question, std::string_view answer) const {
  const std::string whole = Join(question, " ", answer);
  for (const std::string& text : {Normalized(question), Normalized(whole)}) {
    if (const auto it = exact_.find(text); it != exact_.end()) return ContaminationMatch{it->second, 1.0, "exact"};
  }
  const std::vector<std::string> words = Words(whole);
  std::map<size_t, std::vector<bool>> covered;  // by text
  for (const size_t n : {size_t{8}, size_t{5}}) {
    for (size_t at = 0; at + n <= words.size(); ++at) {
      const auto [begin, end] = grams_.equal_range(HashGram(words, at, n));
      for (auto it = begin; it != end; ++it) {
        std::vector<bool>& marks = covered[it->second.text];
        marks.resize(texts_[it->second.text].words);
        std::fill_n(marks.begin() + static_cast<std::ptrdiff_t>(it->second.at), n, true);
      }
    }
  }
  std::optional<ContaminationMatch> best;
  for (const auto& [index, marks] : covered) {
    const Text& text = texts_[index];
    const double coverage =
        static_cast<double>(std::count(marks.begin(), marks.end(), true)) / static_cast<double>(text.words);
    if (coverage < text.limit || (best && coverage <= best->coverage)) continue;
    best = ContaminationMatch{text.item, coverage, Join(text.n, "-gram")};
  }
  return best;
}

}  // namespace refinery::data
