#include "worker/task/runtime/torch.h"
//
#include "worker/task/checkpoint/gguf.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <type_traits>

#include "worker/task/checkpoint/utf8.h"

namespace refinery::checkpoint {
namespace {

constexpr uint64_t kMaxTensors = 1 << 20;
constexpr uint64_t kMaxMetadata = 1 << 16;
constexpr uint64_t kMaxItems = 1 << 24;
constexpr uint32_t kMaxDimensions = 4;
constexpr uint64_t kMaxAlignment = 1 << 20;
constexpr int64_t kRowsPerGrain = 64;

enum ValueType : uint32_t {
  kUint8, kInt8, kUint16, kInt16, kUint32, kInt32, kFloat32, kBoolean, kString, kArray, kUint64, kInt64, kFloat64
};

// Reads the file front to back; every read is checked against the end.
class Cursor {
 public:
  explicit Cursor(const MappedFile& file) : file_(file) {}

  uint64_t offset() const { return offset_; }
  uint64_t left() const { return file_.size() - offset_; }

  // `parts` say what is wrong; the file's name is put before them.
  template <typename... Parts>
  Status Corrupt(const Parts&... parts) const {
    return DataLoss(file_.path().string(), ": ", parts...);
  }
  template <typename... Parts>
  Status Unsupported(const Parts&... parts) const {
    return InvalidArgument(file_.path().string(), ": ", parts...);
  }
  Status Truncated(std::string_view what) const {
    return Corrupt(what, " at byte ", offset_, " runs past the end of the file; it is truncated or corrupt");
  }

  template <typename T>
  StatusOr<T> Read(std::string_view what) {
    if (left() < sizeof(T)) return Truncated(what);
    T value;
    std::memcpy(&value, file_.data() + offset_, sizeof(T));
    offset_ += sizeof(T);
    return value;
  }

  StatusOr<std::string_view> ReadString(std::string_view what) {
    RF_ASSIGN_OR_RETURN(uint64_t length, Read<uint64_t>(what));
    if (length > left()) return Truncated(what);
    std::string_view text = file_.Bytes(offset_, offset_ + length);
    offset_ += length;
    if (!IsUtf8(text)) return Corrupt(what, " is not valid UTF-8; the file is corrupt");
    return text;
  }

 private:
  const MappedFile& file_;
  uint64_t offset_ = 0;
};

// A number of ggml type T as int64, uint64 (only where int64 is too small), double or bool.
template <typename T>
StatusOr<GgufValue> ReadNumber(Cursor& cursor, std::string_view what) {
  RF_ASSIGN_OR_RETURN(T value, cursor.Read<T>(what));
  if constexpr (std::is_floating_point_v<T>) {
    return GgufValue(static_cast<double>(value));
  } else {
    if constexpr (std::is_same_v<T, uint64_t>)
      if (value > uint64_t{INT64_MAX}) return GgufValue(value);
    return GgufValue(static_cast<int64_t>(value));
  }
}

StatusOr<GgufValue> ReadScalar(Cursor& cursor, uint32_t type, const std::string& what) {
  switch (type) {
    case kUint8: return ReadNumber<uint8_t>(cursor, what);
    case kInt8: return ReadNumber<int8_t>(cursor, what);
    case kUint16: return ReadNumber<uint16_t>(cursor, what);
    case kInt16: return ReadNumber<int16_t>(cursor, what);
    case kUint32: return ReadNumber<uint32_t>(cursor, what);
    case kInt32: return ReadNumber<int32_t>(cursor, what);
    case kUint64: return ReadNumber<uint64_t>(cursor, what);
    case kInt64: return ReadNumber<int64_t>(cursor, what);
    case kFloat32: return ReadNumber<float>(cursor, what);
    case kFloat64: return ReadNumber<double>(cursor, what);
    case kBoolean: {
      RF_ASSIGN_OR_RETURN(uint8_t value, cursor.Read<uint8_t>(what));
      return GgufValue(value != 0);
    }
    case kString: {
      RF_ASSIGN_OR_RETURN(std::string_view text, cursor.ReadString(what));
      return GgufValue(text);
    }
    default: return cursor.Corrupt(what, " has the unknown value type ", type, "; the file is corrupt");
  }
}

uint64_t SmallestBytes(uint32_t type) {
  switch (type) {
    case kUint8: case kInt8: case kBoolean: return 1;
    case kUint16: case kInt16: return 2;
    case kUint32: case kInt32: case kFloat32: return 4;
    default: return 8;
  }
}

template <typename T>
StatusOr<GgufValue> ReadItems(Cursor& cursor, uint32_t type, uint64_t count, const std::string& what) {
  std::vector<T> items;
  items.reserve(count);
  for (uint64_t i = 0; i < count; ++i) {
    RF_ASSIGN_OR_RETURN(GgufValue item, ReadScalar(cursor, type, what));
    if (const bool* flag = std::get_if<bool>(&item)) item = static_cast<int64_t>(*flag);
    const T* value = std::get_if<T>(&item);
    if (value == nullptr) return cursor.Corrupt(what, " holds a number out of range");
    items.push_back(*value);
  }
  return GgufValue(std::move(items));
}

StatusOr<GgufValue> ReadValue(Cursor& cursor, const std::string& what) {
  RF_ASSIGN_OR_RETURN(uint32_t type, cursor.Read<uint32_t>(what));
  if (type != kArray) return ReadScalar(cursor, type, what);
  RF_ASSIGN_OR_RETURN(uint32_t item_type, cursor.Read<uint32_t>(what));
  RF_ASSIGN_OR_RETURN(uint64_t count, cursor.Read<uint64_t>(what));
  if (item_type == kArray) return cursor.Unsupported(what, " is an array of arrays, which is not supported");
  if (item_type > kFloat64) return cursor.Corrupt(what, " has the unknown item type ", item_type);
  if (count > kMaxItems) return cursor.Corrupt(what, " claims ", count, " items");
  if (count > cursor.left() / SmallestBytes(item_type)) return cursor.Truncated(what);
  if (item_type == kString) return ReadItems<std::string_view>(cursor, item_type, count, what);
  if (item_type == kFloat32 || item_type == kFloat64) return ReadItems<double>(cursor, item_type, count, what);
  return ReadItems<int64_t>(cursor, item_type, count, what);
}

// One entry of the tensor table; `end` is relative to the data section until the caller knows where that starts.
StatusOr<GgufTensor> ReadTensorFacts(Cursor& cursor) {
  GgufTensor tensor;
  RF_ASSIGN_OR_RETURN(std::string_view name, cursor.ReadString("a tensor name"));
  tensor.name = std::string(name);
  std::string where = Join("tensor ", tensor.name);
  RF_ASSIGN_OR_RETURN(uint32_t dimensions, cursor.Read<uint32_t>(where));
  if (dimensions == 0 || dimensions > kMaxDimensions) return cursor.Corrupt(where, " has ", dimensions, " dimensions");
  uint64_t elements = 1;
  for (uint32_t i = 0; i < dimensions; ++i) {
    RF_ASSIGN_OR_RETURN(uint64_t size, cursor.Read<uint64_t>(where));
    if (size == 0 || size > (uint64_t{1} << 40) || __builtin_mul_overflow(elements, size, &elements) ||
        elements > (uint64_t{1} << 48))
      return cursor.Corrupt(where, " has an impossible shape");
    tensor.shape.insert(tensor.shape.begin(), static_cast<int64_t>(size));
  }
  RF_ASSIGN_OR_RETURN(uint32_t type, cursor.Read<uint32_t>(where));
  tensor.type = FindGgufType(type);
  if (tensor.type == nullptr)
    return cursor.Unsupported(where, " has the tensor type ", type, ", which is not supported (known: ",
                              KnownGgufTypes(), "); convert the model to one of these");
  if (tensor.row_size() % tensor.type->block_size != 0)
    return cursor.Corrupt(where, ": rows of ", tensor.row_size(), " elements do not divide into blocks of ",
                          tensor.type->block_size);
  RF_ASSIGN_OR_RETURN(tensor.begin, cursor.Read<uint64_t>(where));
  uint64_t bytes = elements / static_cast<uint64_t>(tensor.type->block_size) *
                   static_cast<uint64_t>(tensor.type->block_bytes);
  if (__builtin_add_overflow(tensor.begin, bytes, &tensor.end))
    return cursor.Corrupt(where, " has an impossible offset");
  return tensor;
}

// Moves the offsets behind `data_start` and checks alignment, bounds and overlaps.
Status PlaceTensors(std::map<std::string, GgufTensor>& tensors, uint64_t data_start, uint64_t alignment,
                    uint64_t file_size, const std::string& file) {
  std::vector<std::pair<uint64_t, const GgufTensor*>> order;
  uint64_t data_size = file_size - std::min(data_start, file_size);
  for (auto& [name, tensor] : tensors) {
    if (tensor.begin % alignment != 0) return DataLoss(file, ": tensor ", name, " is not aligned");
    if (tensor.end > data_size)
      return DataLoss(file, ": tensor ", name, " ends at data byte ", tensor.end, " of ", data_size,
                      "; the file is truncated or corrupt");
    tensor.begin += data_start;
    tensor.end += data_start;
    order.push_back({tensor.begin, &tensor});
  }
  std::sort(order.begin(), order.end());
  for (size_t i = 1; i < order.size(); ++i)
    if (order[i].first < order[i - 1].second->end)
      return DataLoss(file, ": tensor ", order[i].second->name, " overlaps tensor ", order[i - 1].second->name);
  return absl::OkStatus();
}

}  // namespace

int64_t GgufTensor::rows() const {
  int64_t count = 1;
  for (size_t i = 0; i + 1 < shape.size(); ++i) count *= shape[i];
  return count;
}

StatusOr<std::shared_ptr<const GgufFile>> GgufFile::Open(const std::filesystem::path& path) {
  RF_ASSIGN_OR_RETURN(std::shared_ptr<const MappedFile> file, MappedFile::Open(path));
  std::string name = path.string();
  Cursor cursor(*file);
  RF_ASSIGN_OR_RETURN(uint32_t magic, cursor.Read<uint32_t>("the header"));
  if (magic != 0x46554747) return DataLoss(name, " does not start with \"GGUF\"; it is not a GGUF file");
  RF_ASSIGN_OR_RETURN(uint32_t version, cursor.Read<uint32_t>("the header"));
  if (version != 2 && version != 3)
    return InvalidArgument(name, ": GGUF version ", version, (version & 0xFFFF) == 0 ? " (big-endian?)" : "",
                           " is not supported; versions 2 and 3 are");
  RF_ASSIGN_OR_RETURN(uint64_t tensor_count, cursor.Read<uint64_t>("the header"));
  RF_ASSIGN_OR_RETURN(uint64_t metadata_count, cursor.Read<uint64_t>("the header"));
  if (tensor_count > kMaxTensors || metadata_count > kMaxMetadata)
    return DataLoss(name, ": ", tensor_count, " tensors and ", metadata_count, " metadata entries are implausible");

  std::shared_ptr<GgufFile> result(new GgufFile);
  result->file_ = file;
  for (uint64_t i = 0; i < metadata_count; ++i) {
    RF_ASSIGN_OR_RETURN(std::string_view key, cursor.ReadString("a metadata key"));
    RF_ASSIGN_OR_RETURN(GgufValue value, ReadValue(cursor, Join("metadata ", key)));
    if (!result->metadata_.emplace(key, std::move(value)).second)
      return DataLoss(name, ": the metadata key ", key, " stands twice");
  }
  for (uint64_t i = 0; i < tensor_count; ++i) {
    RF_ASSIGN_OR_RETURN(GgufTensor tensor, ReadTensorFacts(cursor));
    std::string tensor_name = tensor.name;
    if (!result->tensors_.emplace(tensor_name, std::move(tensor)).second)
      return DataLoss(name, ": the tensor ", tensor_name, " stands twice");
  }
  int64_t alignment = result->Int("general.alignment").value_or(32);
  if (alignment < 1 || static_cast<uint64_t>(alignment) > kMaxAlignment)
    return DataLoss(name, ": general.alignment is ", alignment);
  uint64_t step = static_cast<uint64_t>(alignment);
  uint64_t data_start = (cursor.offset() + step - 1) / step * step;
  RF_RETURN_IF_ERROR(PlaceTensors(result->tensors_, data_start, step, file->size(), name));
  return std::shared_ptr<const GgufFile>(std::move(result));
}

const GgufTensor* GgufFile::Find(const std::string& name) const {
  auto found = tensors_.find(name);
  return found == tensors_.end() ? nullptr : &found->second;
}

namespace {
template <typename T>
const T* Value(const std::map<std::string, GgufValue>& metadata, const std::string& key) {
  auto found = metadata.find(key);
  return found == metadata.end() ? nullptr : std::get_if<T>(&found->second);
}
template <typename T>
std::optional<T> Copy(const T* value) {
  return value == nullptr ? std::nullopt : std::optional<T>(*value);
}
}  // namespace

std::optional<int64_t> GgufFile::Int(const std::string& key) const { return Copy(Value<int64_t>(metadata_, key)); }
std::optional<double> GgufFile::Float(const std::string& key) const {
  if (std::optional<int64_t> whole = Int(key)) return static_cast<double>(*whole);
  return Copy(Value<double>(metadata_, key));
}
std::optional<bool> GgufFile::Bool(const std::string& key) const { return Copy(Value<bool>(metadata_, key)); }
std::optional<std::string_view> GgufFile::String(const std::string& key) const {
  return Copy(Value<std::string_view>(metadata_, key));
}
const std::vector<std::string_view>* GgufFile::Strings(const std::string& key) const {
  return Value<std::vector<std::string_view>>(metadata_, key);
}
const std::vector<int64_t>* GgufFile::Ints(const std::string& key) const {
  return Value<std::vector<int64_t>>(metadata_, key);
}

void GgufFile::DequantizeRows(const GgufTensor& tensor, int64_t first, int64_t count, float* out) const {
  int64_t blocks = tensor.row_size() / tensor.type->block_size;
  tensor.type->dequantize(Data(tensor) + first * blocks * tensor.type->block_bytes, count * blocks, out);
}

StatusOr<at::Tensor> GgufFile::Dequantize(const std::string& name) const {
  const GgufTensor* tensor = Find(name);
  if (tensor == nullptr) return NotFound(path().string(), " holds no tensor ", name);
  at::Tensor out = at::empty(tensor->shape, at::kFloat);
  float* data = out.data_ptr<float>();
  at::parallel_for(0, tensor->rows(), kRowsPerGrain, [&](int64_t begin, int64_t end) {
    DequantizeRows(*tensor, begin, end - begin, data + begin * tensor->row_size());
  });
  return out;
}

}  // namespace refinery::checkpoint
