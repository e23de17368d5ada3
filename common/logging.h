// common/logging.h
//
// Logs of the programs: one line an event on standard error, "TIME LEVEL PROGRAM message key=value ...", through spdlog's
// default logger. Standard output carries data only.

#pragma once

#include <string>

#include "common/status.h"

namespace refinery {

// Sets the default logger up; call once, early in main. INVALID_ARGUMENT for a level other than trace, debug, info, warn,
// error, off.
Status InitLogging(const std::string& program, const std::string& level);

}  // namespace refinery
