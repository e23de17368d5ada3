// worker/task/calibration.h
//
// Calibration tokens for GPTQ: the job's own curated examples (prompt and answer) mixed with general text, each shuffled, laid end
// to end without padding and cut into windows of one length. A document keeps what the tokenizer puts around it (BOS, EOS); a window
// may begin and end inside one. Documents that repeat an earlier one, exactly or nearly, are left out. When a source has too few they
// come again in another order, so that each pass shows them behind other neighbours; how often is reported.
//
// Same arguments, same windows.  Threads: functions.

#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/data/example.h"
#include "worker/task/tokenizer/tokenizer.h"

namespace refinery::task {

struct CalibrationRequest {
  const std::vector<data::Example>* examples = nullptr;
  std::vector<std::string> general;    // documents; empty = none
  double general_share = 0;            // of the windows
  double duplicate_threshold = 0.8;    // MinHash similarity from which a document repeats another
  int64_t tokens = 0;
  int64_t sequence_length = 0;
  uint64_t seed = 0;
};

struct CalibrationSource {
  int64_t documents = 0;   // that were used, without duplicates
  int64_t duplicates = 0;  // left out
  int64_t windows = 0;
  double passes = 0;       // over the documents
};

struct Calibration {
  std::vector<std::vector<int32_t>> sequences;  // each of the wanted length
  CalibrationSource examples, general;
  int64_t tokens = 0;
  int64_t distinct_ids = 0;      // of the vocabulary
  double vocabulary_share = 0;
  // What an artifact keeps of this (docs/formats.md).
  nlohmann::json Facts(const CalibrationRequest& request) const;
};

// FAILED_PRECONDITION when there are no examples (or, for a share of 1, no general text), and for a share > 0 without general text.
StatusOr<Calibration> MakeCalibration(const CalibrationRequest& request, const tokenizer::Tokenizer& tokenizer);

// The same of examples alone.
StatusOr<Calibration> MakeCalibration(const std::vector<data::Example>& examples, const tokenizer::Tokenizer& tokenizer,
                                      int64_t tokens, int64_t sequence_length);

// The text of an example: prompt, a space, the answer.
std::string ExampleText(const data::Example& example);

// Documents of a file: of plain text (.txt, .md) the parts between blank lines, of tables and JSON lines the field `text`, or the
// examples that its rows are. NOT_FOUND, INVALID_ARGUMENT naming file and row.
StatusOr<std::vector<std::string>> ReadDocuments(const std::filesystem::path& path);

}  // namespace refinery::task
