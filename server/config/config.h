// server/config/config.h
//
// What refineryd was told to do: defaults, then the file of --config (or REFINERYD_CONFIG), then REFINERYD_* variables, then flags.
//
// Errors: INVALID_ARGUMENT naming the flag, or file and line.  Threads: no shared state.

#pragma once

#include "common/channel.h"
#include "common/status.h"
#include "refinery/v1/config.pb.h"

namespace refinery::config {

struct CommandLine {
  v1::CoordinatorConfig config;
  bool check = false;   // --check-config: say whether it is good and stop
  bool print = false;   // --print-default-config
  std::string restore;  // --restore: a backup to make the state folder from
  int exit_code = -1;   // >= 0: --help or --version was asked for, or the flags were wrong; it is said already
};

v1::CoordinatorConfig DefaultConfig();
StatusOr<CommandLine> ReadCommandLine(int argc, char** argv);

ListenSecurity SecurityOf(const v1::CoordinatorConfig& config);
// Everything that can be found out without starting: files, certificates, principals, whether the address may be listened on.
Status CheckConfig(const v1::CoordinatorConfig& config);

}  // namespace refinery::config
