// worker/task/eval/task_set.h
//
// What `refinery eval --tasks` can name, and the items behind each name: the eight benchmarks, the parts of MMLU (its four groups
// and 57 subjects) and WikiText-2, all as lm-evaluation-harness 0.4.13 defines them, read from <data>/<benchmark>/<split>.jsonl.
//
// Threads: pure functions.

#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/data/benchmark.h"

namespace refinery::eval {

struct TaskSource {
  std::filesystem::path data;     // as `refinery data pull` fills it
  size_t shots = 0;
  size_t limit = 0;               // items per task, per subject of mmlu; 0 = all
  std::string split;              // instead of the official scored split
  std::string pool;               // instead of the split that the harness draws shots from
};

struct TaskItems {
  std::string name;               // as it was named
  std::string benchmark;          // "mmlu" for mmlu_anatomy; "wikitext"
  std::vector<data::MultipleChoiceItem> items;  // with their shots
  std::vector<std::string> pages;               // wikitext: instead of items
  bool acc_norm = false;
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
