// Data files: Parquet, Arrow, CSV, JSON lists and JSON lines; the content decides, so that one target has them all.
#include "common/files.h"
#include "tests/fuzz/fuzz_target.h"
#include "worker/task/data/table.h"

namespace refinery::fuzz {

const char kFormat[] = "table";
const TextKind kTextKind = TextKind::kNone;

std::vector<Seed> Seeds() {
  std::vector<Seed> seeds;
  for (const char* name : {"scalars.parquet", "nested_snappy.parquet", "dictionaries_zstd.parquet", "texts_gzip.parquet",
                           "texts_plain_v2.parquet", "scalars.arrow", "nested_stream.arrow", "dictionaries_stream.arrow",
                           "texts_lz4.arrow", "plain.csv", "list.json", "list.json.expected"}) {
    Seed seed{.name = name};
    auto bytes = ReadFile(std::filesystem::path(REFINERY_SOURCE_DIR) / "tests/vectors/table" / name);
    if (!bytes.ok()) continue;
    seed.bytes = *bytes;
    // Parquet ends with the footer's length and a mark, Arrow files too; Arrow streams begin with a mark and a length.
    if (seed.bytes.size() > 64) {
      seed.fields = {{4, 4}, {8, 4}, {16, 4}, {seed.bytes.size() - 8, 4}, {seed.bytes.size() - 10, 4}};
      for (size_t i = 1; i < 8; ++i) seed.fields.push_back({seed.bytes.size() * i / 8, 4});
    }
    seeds.push_back(std::move(seed));
  }
  return seeds;
}

}  // namespace refinery::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace refinery;
  const bool is_marked = size > 0 && (data[0] == 'P' || data[0] == 'A' || data[0] == 0xff || data[0] == '[' || data[0] == '{');
  const auto& file = fuzz::InputFile(data, size, is_marked ? "input.bin" : "input.csv");
  size_t bytes = 0;
  const Status status = data::ForEachTableRow(file, {}, 100'000, [&](std::string_view json, size_t) {
    bytes += json.size();
    return absl::OkStatus();
  });
  fuzz::inputs_read += status.ok() ? 1 : 0;
  return 0;
}
