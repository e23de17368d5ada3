#include "worker/task/data/filters.h"

#include <algorithm>
#include <cmath>
#include <optional>
#include <unordered_map>
#include <utility>

#include "common/digest.h"
#include "common/files.h"
#include "worker/task/data/contamination.h"
#include "worker/task/data/minhash.h"
#include "worker/task/data/random.h"
#include "worker/task/data/rouge.h"
#include "worker/task/data/text.h"

namespace refinery::data {
namespace {

struct Verdict {
  std::string reason, detail;
};

std::string Percent(double share) { return Join(static_cast<int64_t>(std::lround(100 * share)), " %"); }

std::string NameOf(int64_t index) { return index < 0 ? Join("seed ", -1 - index) : Join("example ", index); }

// All checks of one run; remembers what was kept.
class Sieve {
 public:
  Sieve(const TaskFormat& format, const std::vector<MultipleChoiceItem>& benchmark, const CurateSettings& settings)
      : format_(format), settings_(settings), minhash_(settings.duplicate_threshold) {
    for (const MultipleChoiceItem& item : benchmark) contamination_.Add(item);
  }

  std::optional<Verdict> CheckContamination(const Example& example) const {
    const auto match = contamination_.Find(QuestionOf(format_, PromptText(example)), example.output);
    if (!match) return std::nullopt;
    return Verdict{"contaminated",
                   Join(match->what, " match with benchmark item ", match->item, ", covers ", Percent(match->coverage))};
  }

  std::optional<Verdict> CheckNovelty(const Example& example) const {
    const std::string question = QuestionOf(format_, PromptText(example));
    if (const auto it = questions_.find(Normalized(question)); it != questions_.end()) {
      const bool same = it->second.second == Normalized(example.output);
      return Verdict{same ? "exact_duplicate" : "same_question", Join("of ", NameOf(it->second.first))};
    }
    const std::vector<std::string> words = Words(question);
    if (settings_.novelty_threshold < 1) {
      for (const auto& [other, index] : accepted_) {
        if (RougeLBound(words.size(), other.size()) <= settings_.novelty_threshold) continue;
        const double overlap = RougeL(words, other);
        if (overlap > settings_.novelty_threshold) {
          return Verdict{"not_novel", Join("ROUGE-L ", overlap, " with ", NameOf(index))};
        }
      }
    }
    if (const auto found = minhash_.FindDuplicate(MinHash(Join(question, " ", example.output)))) {
      return Verdict{"near_duplicate", Join("similarity ", found->second, " with ", NameOf(FromId(found->first)))};
    }
    return std::nullopt;
  }

  void Accept(const Example& example, int64_t index) {
    const std::string question = QuestionOf(format_, PromptText(example));
    questions_.emplace(Normalized(question), std::pair(index, Normalized(example.output)));
    accepted_.emplace_back(Words(question), index);
    minhash_.Add(ToId(index), MinHash(Join(question, " ", example.output)));
  }

 private:
  static std::string PromptText(const Example& example) {
    return example.input.empty() ? example.instruction : Join(example.instruction, "\n", example.input);
  }
  // Seeds have negative indices; the index of near-duplicates wants ids that put them first.
  static size_t ToId(int64_t index) { return static_cast<size_t>(index + (int64_t{1} << 40)); }
  static int64_t FromId(size_t id) { return static_cast<int64_t>(id) - (int64_t{1} << 40); }

  const TaskFormat& format_;
  const CurateSettings& settings_;
  ContaminationIndex contamination_;
  MinHashIndex minhash_;
  std::unordered_map<std::string, std::pair<int64_t, std::string>> questions_;  // -> index and answer
  std::vector<std::pair<std::vector<std::string>, int64_t>> accepted_;
};

std::string StringIn(const nlohmann::json& object, const char* field) {
  const auto it = object.find(field);
  return it != object.end() && it->is_string() ? it->get<std::string>() : "";
}

// What earlier stages wrote into the example.
std::optional<Verdict> CheckMarks(const Example& example) {
  if (example.extra.is_object()) {
    if (const auto it = example.extra.find("rejected"); it != example.extra.end() && it->is_object()) {
      const std::string reason = StringIn(*it, "reason");
      return Verdict{reason.empty() ? "rejected" : reason, StringIn(*it, "detail")};
    }
  }
  if (Strip(example.instruction).empty()) return Verdict{"no_question", ""};
  if (Strip(example.output).empty()) return Verdict{"no_answer", ""};
  return std::nullopt;
}

std::optional<Verdict> CheckScore(const Example& example) {
  if (!example.extra.is_object()) return std::nullopt;
  const auto judge = example.extra.find("judge");
  if (judge == example.extra.end() || !judge->is_object()) return std::nullopt;
  const auto keep = judge->find("keep");
  if (keep == judge->end() || !keep->is_boolean() || keep->get<bool>()) return std::nullopt;
  const auto score = judge->find("score");
  return Verdict{"low_score", score == judge->end() ? "" : Join("score ", score->dump())};
}

Status CheckSettings(const CurateSettings& settings) {
  const auto fraction = [](double f) { return f >= 0 && f < 1; };
  if (!fraction(settings.validation_fraction) || !fraction(settings.held_out_fraction) ||
      settings.validation_fraction + settings.held_out_fraction >= 1) {
    return InvalidArgument("curate: validation_fraction ", settings.validation_fraction, " and held_out_fraction ",
                           settings.held_out_fraction, " must each be in [0, 1) and leave a part to train on");
  }
  if (!(settings.duplicate_threshold > 0 && settings.duplicate_threshold <= 1)) {
    return InvalidArgument("curate.duplicate_threshold must be in (0, 1], is ", settings.duplicate_threshold);
  }
  if (!(settings.novelty_threshold > 0 && settings.novelty_threshold <= 1)) {
    return InvalidArgument("curate.novelty_threshold must be in (0, 1], is ", settings.novelty_threshold);
  }
  return absl::OkStatus();
}

// At least one where any is wanted.
size_t ShareOf(size_t n, double fraction) {
  if (fraction <= 0) return 0;
  return std::max<size_t>(1, static_cast<size_t>(std::llround(fraction * static_cast<double>(n))));
}

Status SplitKept(const std::vector<Example>& raw, const std::vector<size_t>& kept, const CurateSettings& settings,
                 Curated* curated) {
  const size_t validation = ShareOf(kept.size(), settings.validation_fraction);
  const size_t held_out = ShareOf(kept.size(), settings.held_out_fraction);
  if (validation + held_out >= kept.size()) {
    std::pair<std::string, int64_t> worst;
    for (const auto& count : curated->counts) {
      if (count.first != "raw" && count.first != "kept" && count.second > worst.second) worst = count;
    }
    return InvalidArgument("curate: only ", kept.size(), " of ", raw.size(), " raw examples are left, too few for ", validation,
                           " validation and ", held_out, " held-out examples and any to train on; most were dropped as '",
                           worst.first, "' (", worst.second, "): ask for more examples or loosen the filters");
  }
  const std::vector<size_t> order =
      SeededRandom(DeriveSeed(settings.seed, "split")).Permutation(kept.size());
  for (size_t i = 0; i < order.size(); ++i) {
    const char* name = i < validation ? "validation" : i < validation + held_out ? "held_out" : "train";
    curated->ledger[kept[order[i]]].kept_as = name;
  }
  for (const size_t index : kept) {  // each split in the order of the raw examples
    const std::string& name = curated->ledger[index].kept_as;
    std::vector<Example>& split = name == "train" ? curated->train
                                  : name == "validation" ? curated->validation : curated->held_out;
    split.push_back(raw[index]);
  }
  return absl::OkStatus();
}

}  // namespace

nlohmann::json ToJson(const LedgerRow& row) {
  return {{"index", row.index}, {"reason", row.reason}, {"detail", row.detail}, {"kept_as", row.kept_as}};
}

Status WriteLedger(const std::filesystem::path& jsonl, const std::vector<LedgerRow>& ledger) {
  std::string text;
  for (const LedgerRow& row : ledger) {
    text += ToJson(row).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  }
  return WriteFileAtomically(jsonl, text);
}

StatusOr<Curated> Curate(const TaskFormat& format, const std::vector<Example>& raw, const std::vector<Example>& seeds,
                         const std::vector<MultipleChoiceItem>& benchmark, const CurateSettings& settings) {
  RF_RETURN_IF_ERROR(CheckSettings(settings));
  Curated curated;
  Sieve sieve(format, benchmark, settings);
  for (size_t i = 0; i < seeds.size(); ++i) sieve.Accept(seeds[i], -1 - static_cast<int64_t>(i));
  std::vector<size_t> kept;
  for (size_t i = 0; i < raw.size(); ++i) {
    std::optional<Verdict> verdict = CheckMarks(raw[i]);
    if (!verdict) verdict = sieve.CheckContamination(raw[i]);
    if (!verdict) verdict = CheckScore(raw[i]);
    if (!verdict) verdict = sieve.CheckNovelty(raw[i]);
    LedgerRow row{.index = static_cast<int64_t>(i)};
    if (verdict) {
      row.reason = std::move(verdict->reason);
      row.detail = std::move(verdict->detail);
      ++curated.counts[row.reason];
    } else {
      sieve.Accept(raw[i], row.index);
      kept.push_back(i);
    }
    curated.ledger.push_back(std::move(row));
  }
  curated.counts["raw"] = static_cast<int64_t>(raw.size());
  curated.counts["kept"] = static_cast<int64_t>(kept.size());
  RF_RETURN_IF_ERROR(SplitKept(raw, kept, settings, &curated));
  for (size_t i = 0; i < std::min(settings.seed_examples, seeds.size()); ++i) {
    LedgerRow row{.index = -1 - static_cast<int64_t>(i)};
    if (auto verdict = sieve.CheckContamination(seeds[i])) {
      row.reason = std::move(verdict->reason);
      row.detail = std::move(verdict->detail);
      ++curated.counts[row.reason];
    } else {
      row.kept_as = "train";
      curated.train.push_back(seeds[i]);
    }
    curated.ledger.push_back(std::move(row));
  }
  curated.counts["train"] = static_cast<int64_t>(curated.train.size());
  curated.counts["validation"] = static_cast<int64_t>(curated.validation.size());
  curated.counts["held_out"] = static_cast<int64_t>(curated.held_out.size());
  return curated;
}

}  // namespace refinery::data
