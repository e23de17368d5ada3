#include "worker/task/data/table.h"

#include <array>
#include <fstream>
#include <memory>

#include "common/files.h"
#include "worker/task/rust/bridge.h"

namespace refinery::data {
namespace {

struct BridgeString : RbString {
  BridgeString() : RbString{nullptr, 0, 0} {}
  ~BridgeString() { RbStringFree(this); }
  BridgeString(const BridgeString&) = delete;
  BridgeString& operator=(const BridgeString&) = delete;
  std::string_view view() const { return {data, size}; }
};

RbText TextOf(std::string_view text) { return {text.data(), text.size()}; }

}  // namespace

bool IsTable(const std::filesystem::path& file) {
  std::string extension = file.extension().string();
  for (const char* known : {".csv", ".parquet", ".arrow", ".feather"})
    if (extension == known) return true;
  std::ifstream stream(file, std::ios::binary);
  std::array<char, 4096> buffer;
  stream.read(buffer.data(), buffer.size());
  std::string_view head(buffer.data(), static_cast<size_t>(stream.gcount()));
  for (std::string_view mark : {"PAR1", "PARE", "ARROW1", "\xff\xff\xff\xff"})
    if (head.starts_with(mark)) return true;
  if (head.starts_with("\xef\xbb\xbf")) head.remove_prefix(3);
  const size_t first = head.find_first_not_of(" \t\r\n");
  return first != std::string_view::npos && head[first] == '[';
}

Status ForEachTableRow(const std::filesystem::path& file, const std::vector<std::string>& columns, size_t limit,
                       const std::function<Status(std::string_view json, size_t row)>& visit) {
  std::error_code missing;
  if (!std::filesystem::is_regular_file(file, missing)) return NotFound(file.string(), ": no such file");
  std::string names;
  for (const std::string& column : columns) names += column + "\n";
  RbTable* opened = nullptr;
  BridgeString error;
  if (RbTableOpen(TextOf(file.native()), TextOf(names), &opened, &error) != 0)
    return InvalidArgument(file.string(), ": ", error.view());
  std::unique_ptr<RbTable, void (*)(RbTable*)> table(opened, RbTableFree);
  for (size_t row = 0; limit == 0 || row < limit;) {
    BridgeString lines;
    if (RbTableNext(table.get(), &lines, &error) != 0) return InvalidArgument(file.string(), ": ", error.view());
    std::string_view rest = lines.view();
    if (rest.empty()) break;
    while (!rest.empty() && (limit == 0 || row < limit)) {
      const size_t end = rest.find('\n');
      RF_RETURN_IF_ERROR(visit(rest.substr(0, end), ++row));
      rest.remove_prefix(end + 1);
    }
  }
  return absl::OkStatus();
}

StatusOr<size_t> ConvertTables(const std::vector<std::filesystem::path>& inputs, const std::vector<std::string>& columns,
                               const std::filesystem::path& output) {
  const std::filesystem::path part = output.string() + ".part";
  size_t rows = 0;
  std::ofstream out(part, std::ios::binary | std::ios::trunc);
  for (const std::filesystem::path& input : inputs) {
    Status status = ForEachTableRow(input, columns, 0, [&](std::string_view json, size_t) -> Status {
      out << json << '\n';
      ++rows;
      return out ? absl::OkStatus() : Unavailable(part.string(), ": writing failed; is the disk full?");
    });
    if (!status.ok()) {
      std::error_code ignored;
      std::filesystem::remove(part, ignored);
      return status;
    }
  }
  out.close();
  if (!out) return Unavailable(part.string(), ": writing failed; is the disk full?");
  RF_RETURN_IF_ERROR(SyncPath(part));
  std::error_code error;
  std::filesystem::rename(part, output, error);
  if (error) return Unavailable(output.string(), ": cannot be written: ", error.message());
  return rows;
}

}  // namespace refinery::data
