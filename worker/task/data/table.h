// worker/task/data/table.h
//
// Data files that are no JSON lines: Parquet, Arrow (file and stream), CSV (RFC 4180 with a header) and JSON lists, read row by
// row through the Rust bridge. How a type of theirs becomes JSON stands in docs/formats.md, "Data files".
//
// Memory: one batch of rows, whatever the file's size.
// Errors: NOT_FOUND; INVALID_ARGUMENT naming the file and the row or column.  Threads: pure functions.

#pragma once

#include <cstddef>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"

namespace refinery::data {

// Whether the file is one of the above and not JSON lines: by its first bytes, and for CSV by its extension. False for a file
// that cannot be read; opening it tells why.
bool IsTable(const std::filesystem::path& file);

// Calls `visit` with each row's JSON text, at most `limit` of them (0 = all), and its number from 1; stops at its first error.
// `columns`: the columns to read, empty = all.
Status ForEachTableRow(const std::filesystem::path& file, const std::vector<std::string>& columns, size_t limit,
                       const std::function<Status(std::string_view json, size_t row)>& visit);

// Writes the rows of all `inputs`, one after the other, to `output` as JSON lines, atomically; JSON lines are read too.
// Returns how many.
StatusOr<size_t> ConvertTables(const std::vector<std::filesystem::path>& inputs, const std::vector<std::string>& columns,
                               const std::filesystem::path& output);

}  // namespace refinery::data
