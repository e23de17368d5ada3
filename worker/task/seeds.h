// worker/task/seeds.h
//
// The seed examples of a task's input "seeds": rows of a benchmark's train split that people wrote.

#pragma once

#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/context.h"
#include "worker/task/data/benchmark.h"

namespace refinery::task {

// At most `limit` items (0 = all). INVALID_ARGUMENT names file, line and field.
StatusOr<std::vector<data::MultipleChoiceItem>> ReadSeeds(const TaskContext& context, const std::string& task, int64_t limit);

}  // namespace refinery::task
