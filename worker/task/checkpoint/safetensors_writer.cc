#include "worker/task/runtime/torch.h"
//
#include "worker/task/checkpoint/safetensors_writer.h"

#include <nlohmann/json.hpp>

namespace refinery::checkpoint {
namespace {

constexpr uint64_t kDataAlignment = 64;

// The length prefix and the JSON header, padded with blanks so that the data starts aligned.
StatusOr<std::string> Header(const std::map<std::string, TensorSpec>& specs,
                             const std::map<std::string, std::string>& metadata, uint64_t* data_bytes) {
  // Joined by hand: an ordered_json object searches its keys one by one, which is quadratic here.
  std::string text = "{";
  if (!metadata.empty()) text += Join("\"__metadata__\":", nlohmann::json(metadata).dump(), ",");
  uint64_t offset = 0;
  for (const auto& [name, spec] : specs) {
    std::string_view dtype = SafetensorsDtypeName(spec.dtype);
    if (dtype.empty()) return InvalidArgument("tensor ", name, " has a dtype that safetensors files cannot hold");
    uint64_t bytes = c10::elementSize(spec.dtype);
    for (int64_t size : spec.shape) bytes *= static_cast<uint64_t>(size);
    nlohmann::ordered_json entry = {
        {"dtype", dtype}, {"shape", spec.shape}, {"data_offsets", {offset, offset + bytes}}};
    text += Join(nlohmann::json(name).dump(), ":", entry.dump(), ",");
    offset += bytes;
  }
  if (text.back() == ',') text.pop_back();
  text += "}";
  uint64_t unpadded = sizeof(uint64_t) + text.size();
  text.append((kDataAlignment - unpadded % kDataAlignment) % kDataAlignment, ' ');
  std::string prefix(sizeof(uint64_t), '\0');
  for (size_t i = 0; i < prefix.size(); ++i) prefix[i] = static_cast<char>(text.size() >> (8 * i));
  *data_bytes = offset;
  return prefix + text;
}

}  // namespace

std::string_view SafetensorsDtypeName(at::ScalarType dtype) {
  switch (dtype) {
    case at::kDouble: return "F64";
    case at::kFloat: return "F32";
    case at::kHalf: return "F16";
    case at::kBFloat16: return "BF16";
    case at::kLong: return "I64";
    case at::kInt: return "I32";
    case at::kShort: return "I16";
    case at::kChar: return "I8";
    case at::kByte: return "U8";
    case at::kBool: return "BOOL";
    default: return "";
  }
}

StatusOr<std::unique_ptr<SafetensorsWriter>> SafetensorsWriter::Create(
    const std::filesystem::path& path, const std::map<std::string, TensorSpec>& specs,
    const std::map<std::string, std::string>& metadata) {
  std::unique_ptr<SafetensorsWriter> writer(new SafetensorsWriter);
  uint64_t data_bytes = 0;
  RF_ASSIGN_OR_RETURN(std::string header, Header(specs, metadata, &data_bytes));
  RF_ASSIGN_OR_RETURN(writer->file_, AtomicFile::Create(path, header.size() + data_bytes));
  RF_RETURN_IF_ERROR(writer->Append(header));
  return writer;
}

Status SafetensorsWriter::Append(std::string_view bytes) { return file_->Append(bytes); }

Status SafetensorsWriter::Finish() { return file_->Finish(); }

}  // namespace refinery::checkpoint
