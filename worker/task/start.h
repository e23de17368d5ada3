// worker/task/start.h
//
// From the command line to RunTask: reads the specification, prepares the folders, sets the threads.

#pragma once

#include <string>

#include "common/status.h"

namespace refinery::task {

struct StartOptions {
  std::string spec, inputs, outputs, checkpoints, resume, cache;
};

// Whether the task succeeded; an error for wrong usage (missing or unreadable specification, outputs not empty).
StatusOr<bool> Start(const StartOptions& options);

// `given`, or ~/.cache/refinery.
std::string CacheFolder(const std::string& given);

}  // namespace refinery::task
