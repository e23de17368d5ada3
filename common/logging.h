// common/logging.h
//
// Logs of the programs: one line an event on standard error through spdlog's default logger, either
//   TIME LEVEL PROGRAM message key=value ...
// or, as "json",
//   {"time":..., "level":..., "program":..., "message":"message key=value ...", "key":"value", ...}
// Standard output carries data only.

#pragma once

#include <string>

#include "common/status.h"

namespace refinery {

// Sets the default logger up; call once, early in main. INVALID_ARGUMENT for a level other than trace, debug, info, warn,
// error, off and a format other than text, json.
Status InitLogging(const std::string& program, const std::string& level, const std::string& format = "text");

// The JSON line of a message; what looks like key=value (or key="value") in it becomes a member of its own.
std::string JsonLogLine(const std::string& time, const std::string& level, const std::string& program, const std::string& message);

}  // namespace refinery
