// client/commands/commands.h
//
// The commands of `refinery`. Each Add function declares its flags; its callback runs after all flags are read and leaves the
// exit code, or an error that main prints, in `result`.
//
// Adding a command: one Add function here, one file beside this one, one line in main.cc.

#pragma once

#include <CLI/CLI.hpp>

#include "client/globals.h"
#include "common/status.h"

namespace refinery::client {

using Result = StatusOr<int>;

void AddChat(CLI::App& app, Globals& globals, Result& result);
void AddRun(CLI::App& app, Globals& globals, Result& result);
void AddSubmit(CLI::App& app, Globals& globals, Result& result);
void AddPlan(CLI::App& app, Globals& globals, Result& result);
void AddWatch(CLI::App& app, Globals& globals, Result& result);
void AddList(CLI::App& app, Globals& globals, Result& result);
void AddDescribe(CLI::App& app, Globals& globals, Result& result);
void AddLogs(CLI::App& app, Globals& globals, Result& result);
void AddCancel(CLI::App& app, Globals& globals, Result& result);
// pause, resume, retry, kill, priority.
void AddChanges(CLI::App& app, Globals& globals, Result& result);
void AddWhy(CLI::App& app, Globals& globals, Result& result);
void AddDiff(CLI::App& app, Globals& globals, Result& result);
void AddAdmin(CLI::App& app, Globals& globals, Result& result);
void AddDoctor(CLI::App& app, Globals& globals, Result& result);
void AddFetch(CLI::App& app, Globals& globals, Result& result);
void AddReport(CLI::App& app, Globals& globals, Result& result);
void AddWorker(CLI::App& app, Globals& globals, Result& result);
void AddVersion(CLI::App& app, Globals& globals, Result& result);
void AddCompletion(CLI::App& app, Globals& globals, Result& result);
void AddData(CLI::App& app, Globals& globals, Result& result);
void AddEval(CLI::App& app, Globals& globals, Result& result);
void AddLint(CLI::App& app, Globals& globals, Result& result);

}  // namespace refinery::client
