// worker/task/data/example.h
//
// One training example in Alpaca form and the files that hold them: JSONL, or any table that table.h reads (CSV, Parquet, ...).

#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/status.h"

namespace refinery::data {

struct Example {
  std::string instruction;               // what the student sees, e.g. "Question: ...\nAnswer:"
  std::string input;                     // Alpaca's optional second part
  std::string output;                    // the answer; joined to the prompt by one space
  std::string origin;                    // "seed" or "teacher"
  std::vector<std::string> choices;      // multiple choice, where the task has them
  int64_t answer_index = -1;             // into choices
  nlohmann::json extra;                  // scores, topic, request index; kept, never interpreted by training
};

nlohmann::json ToJson(const Example& example);
// Errors name `where` ("train.jsonl:12").
StatusOr<Example> ExampleFromJson(const nlohmann::json& json, const std::string& where);
StatusOr<std::vector<Example>> ReadExamples(const std::filesystem::path& jsonl, size_t limit = 0);
Status WriteExamples(const std::filesystem::path& jsonl, const std::vector<Example>& examples);
// Every line of a JSONL file that is not blank, or every row of a table (see table.h), at most `limit` of them (0 = all).
// `where` is "FILE:LINE" or "FILE: row N". NOT_FOUND, INVALID_ARGUMENT for a row that is not JSON, or the first error that
// `visit` returns.
Status ForEachJsonLine(const std::filesystem::path& jsonl, size_t limit,
                       const std::function<Status(nlohmann::json row, const std::string& where)>& visit);
// Any JSONL file; errors name file and line.
StatusOr<std::vector<nlohmann::json>> ReadJsonLines(const std::filesystem::path& jsonl, size_t limit = 0);

}  // namespace refinery::data
