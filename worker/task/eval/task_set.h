// worker/task/eval/task_set.h
//
// What `refinery eval --tasks` can name, and the items behind each name: the eight benchmarks, the parts of MMLU (its four groups
// and 57 subjects) and WikiText-2, all as lm-evaluation-harness 0.4.13 defines them, read from <data>/<benchmark>/<split>.jsonl; and
// task files of the user's own (task_file.h).
//
// Threads: pure functions.

#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/data/benchmark.h"

namespace refinery::eval {

struct TaskSource {
  std::filesystem::path data;     // as `refinery data pull` fills it
  std::optional<size_t> shots;    // unset: none, or what the task file says
  size_t limit = 0;               // items per task, per subject of mmlu; 0 = all
  std::string split;              // instead of the official scored split
  std::string pool;               // instead of the split that the harness draws shots from
};

// How generated answers are compared with the right ones, as the harness' exact_match does: both lose what is ignored.
struct ExactMatchRules {
  std::vector<std::string> stop;       // an answer ends before the first of them
  int64_t max_new_tokens = 32;
  bool strip = true;                   // white space at both ends of the generated answer
  bool ignore_case = false;
  bool ignore_punctuation = false;     // ASCII's
  bool ignore_numbers = false;         // digits 0-9
};

struct TaskItems {
  enum class Kind {
    kMultipleChoice,   // acc, acc_norm
    kText,             // pages: perplexity per word and byte
    kAnswer,           // one right answer behind a context: perplexity per answer, share of greedy ones
    kExactMatch,       // generated answers
  };
  std::string name;               // as it was named
  Kind kind = Kind::kMultipleChoice;
  std::vector<data::MultipleChoiceItem> items;  // with their shots; kAnswer and kExactMatch: `choices` is the right answer
  std::vector<std::string> pages;               // kText: instead of items
  bool acc_norm = false;
  bool detokenize = true;         // kText: undo WikiText's spacing
  ExactMatchRules exact_match;
};

// INVALID_ARGUMENT for an unknown name (lists the known ones); NOT_FOUND for data that is not there, with the command that
// brings it.
StatusOr<TaskItems> LoadTaskItems(const std::string& name, const TaskSource& source);
// Whether LoadTaskItems knows the name.
bool IsKnownTask(const std::string& name);

// The four groups of MMLU in the order of the harness, and the group of each subject ("" for an unknown one).
const std::vector<std::string>& MmluGroups();
std::string MmluGroupOf(const std::string& subject);

}  // namespace refinery::eval
