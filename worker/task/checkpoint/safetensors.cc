#include "worker/task/runtime/torch.h"
//
#include "worker/task/checkpoint/safetensors.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>

#include "worker/task/checkpoint/mapped_file.h"
#include "worker/task/checkpoint/safetensors_writer.h"

namespace refinery::checkpoint {
namespace {

using nlohmann::json;

constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // the limit of the reference implementation
constexpr size_t kMaxRank = 32;

std::optional<at::ScalarType> DtypeFromName(std::string_view name) {
  for (at::ScalarType dtype : {at::kDouble, at::kFloat, at::kHalf, at::kBFloat16, at::kLong, at::kInt, at::kShort,
                               at::kChar, at::kByte, at::kBool})
    if (SafetensorsDtypeName(dtype) == name) return dtype;
  return std::nullopt;
}

// Checks one header entry. `data_start` and `data_size` describe the data section.
StatusOr<TensorInfo> ParseEntry(const json& entry, const std::string& where, uint64_t data_start,
                                uint64_t data_size) {
  if (!entry.is_object()) return DataLoss(where, ": the header entry is not an object");
  auto dtype = entry.find("dtype"), shape = entry.find("shape"), offsets = entry.find("data_offsets");
  if (dtype == entry.end() || !dtype->is_string() || shape == entry.end() || !shape->is_array() ||
      offsets == entry.end() || !offsets->is_array() || offsets->size() != 2 || !(*offsets)[0].is_number_unsigned() ||
      !(*offsets)[1].is_number_unsigned())
    return DataLoss(where, ": dtype, shape or data_offsets is missing or malformed");
  TensorInfo info;
  std::optional<at::ScalarType> known = DtypeFromName(dtype->get<std::string>());
  if (!known) return InvalidArgument(where, ": dtype ", dtype->get<std::string>(), " is not supported");
  info.dtype = *known;
  if (shape->size() > kMaxRank) return DataLoss(where, ": ", shape->size(), " dimensions");
  uint64_t bytes = c10::elementSize(info.dtype), span = bytes;
  for (const json& size : *shape) {
    if (!size.is_number_unsigned()) return DataLoss(where, ": a dimension is not a whole number");
    uint64_t value = size.get<uint64_t>();
    // A zero anywhere empties the tensor; its strides, computed as if it were a one, must fit an int64 all the same.
    if (value > uint64_t{INT64_MAX} || __builtin_mul_overflow(span, std::max<uint64_t>(value, 1), &span) ||
        span > uint64_t{INT64_MAX})
      return DataLoss(where, ": the shape overflows");
    bytes *= value;
    info.shape.push_back(static_cast<int64_t>(value));
  }
  uint64_t begin = (*offsets)[0].get<uint64_t>(), end = (*offsets)[1].get<uint64_t>();
  if (begin > end || end > data_size)
    return DataLoss(where, ": data_offsets [", begin, ", ", end, "] lie outside the ", data_size,
                    " data bytes; the file is truncated or corrupt");
  if (end - begin != bytes)
    return DataLoss(where, ": data_offsets span ", end - begin, " bytes, but dtype and shape need ", bytes);
  info.begin = data_start + begin;
  info.end = data_start + end;
  return info;
}

// The tensors must cover the data section without gap or overlap, as the reference implementation demands.
Status CheckCoverage(const std::string& file, const std::map<std::string, TensorInfo>& tensors, uint64_t data_start,
                     uint64_t file_size) {
  std::vector<std::pair<std::pair<uint64_t, uint64_t>, std::string>> spans;
  for (const auto& [name, info] : tensors) spans.push_back({{info.begin, info.end}, name});
  std::sort(spans.begin(), spans.end());
  uint64_t next = data_start;
  for (const auto& [span, name] : spans) {
    if (span.first != next)
      return DataLoss(file, ": tensor ", name, span.first < next ? " overlaps the one before it" : " follows a gap");
    next = span.second;
  }
  if (next != file_size) return DataLoss(file, ": ", file_size - next, " bytes belong to no tensor");
  return absl::OkStatus();
}

}  // namespace

struct SafetensorsFile::Mapping {
  std::shared_ptr<const MappedFile> file;
};

SafetensorsFile::~SafetensorsFile() = default;

StatusOr<std::shared_ptr<SafetensorsFile>> SafetensorsFile::Open(const std::filesystem::path& path) {
  RF_ASSIGN_OR_RETURN(std::shared_ptr<const MappedFile> file, MappedFile::Open(path));
  std::string name = path.string();
  if (file->size() < 8) return DataLoss(name, ": ", file->size(), " bytes are too few for a safetensors file");
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, file->data(), sizeof(header_bytes));
  if (header_bytes > kMaxHeaderBytes || header_bytes > file->size() - 8)
    return DataLoss(name, ": the header length ", header_bytes, " does not fit; not a safetensors file, or truncated");
  uint64_t data_start = 8 + header_bytes;
  std::string_view text = file->Bytes(8, data_start);
  json header = json::parse(text.begin(), text.end(), nullptr, /*allow_exceptions=*/false);
  if (!header.is_object()) return DataLoss(name, ": the header is not a JSON object");

  std::shared_ptr<SafetensorsFile> result(new SafetensorsFile);
  result->path_ = path;
  for (const auto& [key, entry] : header.items()) {
    if (key == "__metadata__") {
      if (!entry.is_object()) return DataLoss(name, ": __metadata__ is not an object");
      for (const auto& [field, value] : entry.items()) {
        if (!value.is_string()) return DataLoss(name, ": __metadata__.", field, " is not a string");
        result->metadata_[field] = value.get<std::string>();
      }
      continue;
    }
    RF_ASSIGN_OR_RETURN(TensorInfo info, ParseEntry(entry, Join(name, ": tensor ", key), data_start,
                                                    file->size() - data_start));
    result->tensors_.emplace(key, std::move(info));
  }
  RF_RETURN_IF_ERROR(CheckCoverage(name, result->tensors_, data_start, file->size()));
  result->mapping_ = std::make_shared<Mapping>(Mapping{std::move(file)});
  return result;
}

StatusOr<at::Tensor> SafetensorsFile::Get(const std::string& name) const {
  auto found = tensors_.find(name);
  if (found == tensors_.end()) return NotFound(path_.string(), " holds no tensor ", name);
  const TensorInfo& info = found->second;
  at::TensorOptions options = at::TensorOptions().dtype(info.dtype);
  if (info.begin == info.end) return at::empty(info.shape, options);
  const uint8_t* data = mapping_->file->data() + info.begin;
  if (reinterpret_cast<uintptr_t>(data) % c10::elementSize(info.dtype) != 0) {
    at::Tensor copy = at::empty(info.shape, options);
    std::memcpy(copy.data_ptr(), data, info.end - info.begin);
    mapping_->file->Release(info.begin, info.end);
    return copy;
  }
  // The deleter's copy of the pointer keeps the mapping alive as long as any tensor over it; when the last one goes, its pages
  // go too: who copies a model tensor by tensor never holds it twice.
  const auto release = [mapping = mapping_, begin = info.begin, end = info.end](void*) { mapping->file->Release(begin, end); };
  return at::from_blob(const_cast<uint8_t*>(data), info.shape, release, options);
}

Status WriteSafetensors(const std::filesystem::path& path, const std::map<std::string, at::Tensor>& tensors,
                        const std::map<std::string, std::string>& metadata) {
  std::map<std::string, TensorSpec> specs;
  for (const auto& [name, tensor] : tensors) specs[name] = {tensor.scalar_type(), tensor.sizes().vec()};
  RF_ASSIGN_OR_RETURN(auto writer, SafetensorsWriter::Create(path, specs, metadata));
  for (const auto& [name, tensor] : tensors) {
    at::Tensor bytes = tensor.detach().cpu().contiguous();
    RF_RETURN_IF_ERROR(writer->Append({static_cast<const char*>(bytes.data_ptr()), bytes.nbytes()}));
  }
  return writer->Finish();
}

}  // namespace refinery::checkpoint
