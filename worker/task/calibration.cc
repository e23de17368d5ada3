#include "worker/task/calibration.h"

#include <algorithm>
#include <cmath>
#include <set>
#include <unordered_set>

#include "common/digest.h"
#include "common/files.h"
#include "worker/task/data/minhash.h"
#include "worker/task/data/random.h"
#include "worker/task/data/text.h"

namespace refinery::task {
namespace {

// Documents seen so far, of all sources.
class Seen {
 public:
  explicit Seen(double threshold) : near_(threshold) {}

  // Whether the text is new; remembers it if so.
  bool Add(const std::string& text) {
    if (!exact_.insert(data::Normalized(text)).second) return false;
    const data::MinHashSignature signature = data::MinHash(text);
    if (near_.FindDuplicate(signature)) return false;
    near_.Add(exact_.size(), signature);
    return true;
  }

 private:
  std::unordered_set<std::string> exact_;
  data::MinHashIndex near_;
};

// Fills `windows` windows from the documents, which are tokenised only as far as they are needed.
Status Pack(const std::vector<std::string>& documents, int64_t windows, const std::string& stream_name,
            const CalibrationRequest& request, const tokenizer::Tokenizer& tokenizer, Seen& seen, Calibration* calibration,
            CalibrationSource* source) {
  const auto wanted = static_cast<size_t>(windows * request.sequence_length);
  std::vector<int32_t> stream;
  std::vector<std::vector<int32_t>> kept;
  uint64_t pass = 0;
  const auto seed = [&] { return DeriveSeed(request.seed + pass, stream_name); };
  for (const size_t i : data::SeededRandom(seed()).Permutation(documents.size())) {
    if (stream.size() >= wanted) break;
    if (!seen.Add(documents[i])) {
      ++source->duplicates;
      continue;
    }
    RF_ASSIGN_OR_RETURN(std::vector<int32_t> ids, tokenizer.Encode(documents[i] + "\n\n"));
    stream.insert(stream.end(), ids.begin(), ids.end());
    kept.push_back(std::move(ids));
  }
  source->documents = static_cast<int64_t>(kept.size());
  if (stream.empty()) return FailedPrecondition("the calibration text has no tokens");
  int64_t used = source->documents;
  while (stream.size() < wanted) {
    ++pass;
    for (const size_t i : data::SeededRandom(seed()).Permutation(kept.size())) {
      if (stream.size() >= wanted) break;
      stream.insert(stream.end(), kept[i].begin(), kept[i].end());
      ++used;
    }
  }
  source->windows = windows;
  source->passes = static_cast<double>(used) / static_cast<double>(kept.size());
  for (int64_t i = 0; i < windows; ++i) {
    const auto begin = stream.begin() + i * request.sequence_length;
    calibration->sequences.emplace_back(begin, begin + request.sequence_length);
  }
  return absl::OkStatus();
}

nlohmann::json SourceJson(const CalibrationSource& source) {
  return {{"documents", source.documents}, {"duplicates", source.duplicates}, {"windows", source.windows}, {"passes", source.passes}};
}

}  // namespace

std::string ExampleText(const data::Example& example) {
  const std::string prompt = example.input.empty() ? example.instruction : example.instruction + "\n" + example.input;
  return prompt + " " + example.output;
}

nlohmann::json Calibration::Facts(const CalibrationRequest& request) const {
  return {{"sequence_length", request.sequence_length}, {"seed", request.seed},       {"general_share", request.general_share},
          {"examples", SourceJson(examples)},           {"general", SourceJson(general)}, {"distinct_ids", distinct_ids},
          {"vocabulary_share", vocabulary_share}};
}

StatusOr<Calibration> MakeCalibration(const CalibrationRequest& request, const tokenizer::Tokenizer& tokenizer) {
  const int64_t windows = std::max<int64_t>(1, request.tokens / request.sequence_length);
  const int64_t general = std::llround(request.general_share * static_cast<double>(windows));
  if (general < windows && request.examples->empty())
    return FailedPrecondition("no curated examples to calibrate with: lower the filters of `critique` and `curate`");
  if (general > 0 && request.general.empty())
    return FailedPrecondition("quantize.gptq.calibration.general_share is ", request.general_share,
                              ", but the file of quantize.gptq.calibration.general holds no text; give one that does, or leave it out");
  Calibration calibration;
  Seen seen(request.duplicate_threshold);
  if (general < windows) {
    std::vector<std::string> texts;
    for (const data::Example& example : *request.examples) texts.push_back(ExampleText(example));
    RF_RETURN_IF_ERROR(
        Pack(texts, windows - general, "calibration", request, tokenizer, seen, &calibration, &calibration.examples));
  }
  if (general > 0) {
    RF_RETURN_IF_ERROR(
        Pack(request.general, general, "general", request, tokenizer, seen, &calibration, &calibration.general));
  }
  std::set<int32_t> distinct;
  for (const std::vector<int32_t>& sequence : calibration.sequences) {
    distinct.insert(sequence.begin(), sequence.end());
    calibration.tokens += static_cast<int64_t>(sequence.size());
  }
  calibration.distinct_ids = static_cast<int64_t>(distinct.size());
  calibration.vocabulary_share = static_cast<double>(distinct.size()) / static_cast<double>(std::max<int64_t>(1, tokenizer.vocab_size()));
  return calibration;
}

StatusOr<Calibration> MakeCalibration(const std::vector<data::Example>& examples, const tokenizer::Tokenizer& tokenizer,
                                      int64_t tokens, int64_t sequence_length) {
  return MakeCalibration({.examples = &examples, .tokens = tokens, .sequence_length = sequence_length}, tokenizer);
}

StatusOr<std::vector<std::string>> ReadDocuments(const std::filesystem::path& path) {
  std::vector<std::string> documents;
  if (path.extension() != ".txt" && path.extension() != ".md") {
    RF_RETURN_IF_ERROR(data::ForEachJsonLine(path, 0, [&](nlohmann::json row, const std::string& where) -> Status {
      if (row.is_object() && row.contains("text") && row["text"].is_string()) {
        documents.push_back(row["text"].get<std::string>());
        return absl::OkStatus();
      }
      StatusOr<data::Example> example = data::ExampleFromJson(row, where);
      if (!example.ok()) return InvalidArgument(where, ": has neither a field 'text' nor those of an example");
      documents.push_back(ExampleText(*example));
      return absl::OkStatus();
    }));
    return documents;
  }
  RF_ASSIGN_OR_RETURN(const std::string text, ReadFile(path));
  std::string document;
  const auto close = [&] {
    if (!data::Strip(document).empty()) documents.emplace_back(data::Strip(document));
    document.clear();
  };
  for (const std::string& line : data::Split(text, "\n")) {
    if (data::Strip(line).empty()) {
      close();
    } else {
      document += line + "\n";
    }
  }
  close();
  return documents;
}

}  // namespace refinery::task
