// worker/task/eval/task_file.h
//
// Tasks of the user's own, written in YAML (docs/formats.md, "Task files"): multiple choice, exact match of generated answers,
// perplexity of texts or of answers. Prompts are Jinja templates over the fields of a row.
//
// Errors: INVALID_ARGUMENT "FILE:LINE: ..." that names the key and what it may hold; for a row also its file and line.
// Threads: pure functions.

#pragma once

#include <string>

#include "common/status.h"
#include "worker/task/eval/task_set.h"

namespace refinery::eval {

// The items of the task that `file` describes. Of `source` count shots and limit; data files are relative to the task file.
StatusOr<TaskItems> LoadTaskFile(const std::string& file, const TaskSource& source);

}  // namespace refinery::eval
