// worker/task/export/stored_size.h
//
// Bytes that a linear layer takes in an exported folder, before there are codes: what a size budget counts.
//
// Source: the layouts in docs/formats.md.  Errors: none.  Threads: functions.

#pragma once

#include <cstdint>
#include <vector>

#include "worker/task/export/loader_lint.h"

namespace refinery::exporting {

// Of `out` x `in` weights of `bits` bits with the group size, grid and order of `settings`: codes, scales and zero points as the
// format stores them, or 16-bit weights where no block type of GGUF holds them. GPTQ's g_idx does not count.
int64_t StoredBytes(Format format, const QuantSettings& settings, int64_t out, int64_t in, int64_t bits);

// Of the format that takes the most; of GPTQ where none is named.
int64_t LargestStoredBytes(const std::vector<Format>& formats, const QuantSettings& settings, int64_t out, int64_t in, int64_t bits);

}  // namespace refinery::exporting
