// common/config_file.h
//
// Configuration of the programs in layers: default < file < environment < flag. A program fills a message of config.proto with its
// defaults, lets LoadConfig lay the file over it, then parses its flags (which know their environment variables) into it.
//
// Errors: INVALID_ARGUMENT "FILE:LINE: ..." naming the field; NOT_FOUND.  Threads: no shared state.

#pragma once

#include <google/protobuf/message.h>

#include <string>

#include "common/status.h"

namespace refinery {

// The file that `--config FILE` or `--config=FILE` names, or else the environment variable; "" for none. It is needed before the
// flags are parsed, because they come last.
std::string ConfigPath(int argc, const char* const* argv, const char* environment);

// Lays the file's values over `config`. Relative paths in it stay as they are: they are meant from the working folder.
Status LoadConfig(const std::string& path, google::protobuf::Message* config);

// `config` as YAML that LoadConfig reads back, with a head that says where it comes from.
std::string ConfigText(const google::protobuf::Message& config, const std::string& program);

}  // namespace refinery
