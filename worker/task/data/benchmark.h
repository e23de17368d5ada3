// worker/task/data/benchmark.h
//
// The eight multiple-choice benchmarks: from a row with Hugging Face's field names to the exact contexts and continuations
// that lm-evaluation-harness 0.4.13 scores, to few-shot prompts, and to training examples in the same format.
//
// Tasks: arc_easy, commonsense_qa, hellaswag, mmlu, openbookqa, piqa, social_i_qa (also social_iqa, siqa), winogrande.
// Errors: INVALID_ARGUMENT naming file, line and field; also for rows without an answer (hidden test splits).
// Threads: pure functions.

#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/data/example.h"

namespace refinery::data {

// One solved example before the question, as chat templates want it: what is asked and what is answered.
struct Turn {
  std::string question, answer;
};

struct MultipleChoiceItem {
  std::string task;
  std::string subject;                     // mmlu only
  std::string description;                 // stands once before everything else (mmlu); usually empty
  std::string shots;                       // few-shot text between description and body; see WithShots
  std::vector<Turn> turns;                 // the same examples one by one
  std::string delimiter = " ";             // between a body and its answer
  std::vector<std::string> bodies;         // the row's own context: one for all choices, or one per choice (winogrande)
  std::vector<std::string> continuations;  // per choice, with the leading space; the same text for all in winogrande
  std::vector<std::string> choices;        // the strings whose length acc_norm divides by
  std::vector<std::string> answers;        // the answers themselves, also where the choices are letters
  std::string question;                    // the bare question (winogrande: up to the gap, with the right name)
  int64_t gold = -1;
  std::string row;                         // the whole row as JSON: two items are the same where their rows are

  // What stands before the continuation of a choice: description + shots + body.
  std::string ContextOf(size_t choice) const;
  // This item as an example for others: body of the right choice + its continuation.
  std::string Shot() const;
};

// The canonical name of a task; INVALID_ARGUMENT lists the known ones.
StatusOr<std::string> CanonicalTask(const std::string& name);
// Whether the task's official metrics include acc_norm.
bool HasAccNorm(const std::string& task);

// `where` stands before messages ("dev.jsonl:12").
StatusOr<MultipleChoiceItem> ItemFromRow(const std::string& task, const nlohmann::json& row, const std::string& where);
StatusOr<std::vector<MultipleChoiceItem>> ReadItems(const std::string& task, const std::filesystem::path& jsonl,
                                                    size_t limit = 0);

// The item with `shots` before it, each followed by an empty line.
MultipleChoiceItem WithShots(MultipleChoiceItem item, const std::vector<MultipleChoiceItem>& shots);
// Few-shot prompts as the harness makes them (seed 1234, shots drawn afresh per item in order; mmlu: the subject's first k).
// Where the item itself may be in the pool one more is drawn; should all of them be copies of the item, the shots are drawn
// again from the pool without it.
// FAILED_PRECONDITION when the pool is too small.
StatusOr<std::vector<MultipleChoiceItem>> WithHarnessShots(const std::vector<MultipleChoiceItem>& items,
                                                           const std::vector<MultipleChoiceItem>& pool, size_t k);

// The same by the harness' random sampler alone, for any rows; `exclude`: the items may be in the pool.
StatusOr<std::vector<MultipleChoiceItem>> WithDrawnShots(const std::vector<MultipleChoiceItem>& items,
                                                         const std::vector<MultipleChoiceItem>& pool, size_t k, bool exclude);

// instruction = description + body, output = the right continuation without its space (a letter where the task asks for
// letters), choices and answer_index as in the row, extra = {"question", "task"}. The few-shot text is not part of it.
Example ExampleFromItem(const MultipleChoiceItem& item);

}  // namespace refinery::data
