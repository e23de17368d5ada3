#include "client/data/hub.h"

#include <algorithm>
#include <fstream>

#include "client/data/programs.h"
#include "common/files.h"

namespace refinery::client {
namespace {

size_t CountLines(const std::filesystem::path& file) {
  std::ifstream stream(file, std::ios::binary);
  return static_cast<size_t>(std::count(std::istreambuf_iterator<char>(stream), {}, '\n'));
}

}  // namespace

Status FetchSplit(const std::string& hub, const BenchmarkSource& source, const Split& split,
                  const std::filesystem::path& folder, const Converter& convert) {
  const size_t last = source.hub_folder.rfind('/');
  const std::string url = Join(hub, "/datasets/", source.hub_folder.substr(0, last), "/resolve/refs%2Fconvert%2Fparquet",
                               source.hub_folder.substr(last), "/", split.name, "/0000.parquet");
  const std::filesystem::path file = SplitFile(folder, source, split), part = file.string() + ".part";
  const std::filesystem::path parquet = file.parent_path() / (split.name + ".parquet");
  RF_RETURN_IF_ERROR(CreateFolders(file.parent_path()));
  RF_RETURN_IF_ERROR(FetchFile(url, parquet));
  Status status = convert({parquet}, part);
  std::error_code error;
  std::filesystem::remove(parquet, error);
  RF_RETURN_IF_ERROR(status);
  if (size_t rows = CountLines(part); rows != split.rows) {
    std::filesystem::remove(part, error);
    return DataLoss(url, " holds ", rows, " rows, expected ", split.rows);
  }
  std::filesystem::rename(part, file, error);
  if (error) return Unavailable(file.string(), ": cannot be written: ", error.message());
  return absl::OkStatus();
}

}  // namespace refinery::client
