// client/task_program.h
//
// Commands whose work is done by refinery-task, which lies beside this program: this process becomes it, so that the terminal,
// the exit code and Ctrl-C are its own.
//
// Threads: one.

#pragma once

#include <string>
#include <vector>

#include "common/status.h"

namespace refinery::client {

// Does not come back when the program starts. `given` = the program; empty = beside this one. NOT_FOUND naming it.
Status BecomeTaskProgram(const std::string& given, std::vector<std::string> arguments);

}  // namespace refinery::client
