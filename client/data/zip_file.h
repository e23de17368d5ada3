// client/data/zip_file.h
//
// Members of a zip archive: their names, one as a file, and a gzip-compressed text line by line.
//
// Errors: NOT_FOUND without the archive or the member, DATA_LOSS when either is damaged, RESOURCE_EXHAUSTED for a line above
// the limit.  Threads: one.

#pragma once

#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"

namespace refinery::client {

StatusOr<std::vector<std::string>> ListMembers(const std::filesystem::path& archive);
// Writes the member to `file`, piece by piece.
Status ExtractMember(const std::filesystem::path& archive, const std::string& member, const std::filesystem::path& file);
// Calls `on_line` for each line, without its end; stops at its first error.
Status ReadGzipMember(const std::filesystem::path& archive, const std::string& member,
                      const std::function<Status(std::string_view line)>& on_line);

}  // namespace refinery::client
