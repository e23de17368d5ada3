#include "worker/task/checkpoint/gguf_writer.h"

#include <cstring>

namespace refinery::checkpoint {
namespace {

constexpr uint64_t kAlignment = 32;
constexpr uint32_t kVersion = 3;
constexpr uint32_t kArrayType = 9;

uint64_t Padded(uint64_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

template <typename T>
void Put(std::string* out, T value) {
  char bytes[sizeof(T)];
  std::memcpy(bytes, &value, sizeof(T));
  out->append(bytes, sizeof(T));
}

void Put(std::string* out, const std::string& text) {
  Put<uint64_t>(out, text.size());
  *out += text;
}

// The format's number of a value's type; of an array, of its items.
template <typename T>
constexpr uint32_t TypeNumber() {
  if constexpr (std::is_same_v<T, uint32_t>) return 4;
  if constexpr (std::is_same_v<T, int32_t>) return 5;
  if constexpr (std::is_same_v<T, float>) return 6;
  if constexpr (std::is_same_v<T, bool>) return 7;
  if constexpr (std::is_same_v<T, std::string>) return 8;
  if constexpr (std::is_same_v<T, uint64_t>) return 10;
}

struct PutValue {
  std::string* out;

  template <typename T>
  void operator()(const T& value) const {
    Put(out, TypeNumber<T>());
    Put(out, value);
  }
  template <typename T>
  void operator()(const std::vector<T>& items) const {
    Put(out, kArrayType);
    Put(out, TypeNumber<T>());
    Put<uint64_t>(out, items.size());
    for (const T& item : items) Put(out, item);
  }
};

std::string Header(const GgufNewMetadata& metadata, const std::vector<GgufNewTensor>& tensors) {
  std::string out = "GGUF";
  Put(&out, kVersion);
  Put<uint64_t>(&out, tensors.size());
  Put<uint64_t>(&out, metadata.size());
  for (const auto& [key, value] : metadata) {
    Put(&out, key);
    std::visit(PutValue{&out}, value);
  }
  uint64_t offset = 0;
  for (const GgufNewTensor& tensor : tensors) {
    Put(&out, tensor.name);
    Put(&out, static_cast<uint32_t>(tensor.shape.size()));
    for (auto size = tensor.shape.rbegin(); size != tensor.shape.rend(); ++size) Put(&out, static_cast<uint64_t>(*size));
    Put(&out, tensor.type);
    Put(&out, offset);
    offset += Padded(tensor.bytes());
  }
  out.resize(Padded(out.size()), '\0');
  return out;
}

}  // namespace

uint64_t GgufNewTensor::bytes() const {
  const GgufType* known = FindGgufType(type);
  if (known == nullptr || shape.empty() || shape.back() % known->block_size != 0) return 0;
  uint64_t blocks = static_cast<uint64_t>(shape.back() / known->block_size);
  for (size_t i = 0; i + 1 < shape.size(); ++i) blocks *= static_cast<uint64_t>(shape[i]);
  return blocks * static_cast<uint64_t>(known->block_bytes);
}

StatusOr<std::unique_ptr<GgufWriter>> GgufWriter::Create(const std::filesystem::path& path, const GgufNewMetadata& metadata,
                                                         std::vector<GgufNewTensor> tensors) {
  uint64_t data = 0;
  for (const GgufNewTensor& tensor : tensors) {
    if (tensor.bytes() == 0)
      return InvalidArgument(path.string(), ": the tensor ", tensor.name, " is empty, of an unknown type, or its rows of ",
                             tensor.shape.empty() ? 0 : tensor.shape.back(), " do not divide into blocks");
    data += Padded(tensor.bytes());
  }
  std::unique_ptr<GgufWriter> writer(new GgufWriter);
  writer->tensors_ = std::move(tensors);
  const std::string header = Header(metadata, writer->tensors_);
  RF_ASSIGN_OR_RETURN(writer->file_, AtomicFile::Create(path, header.size() + data));
  RF_RETURN_IF_ERROR(writer->file_->Append(header));
  return writer;
}

Status GgufWriter::Append(std::string_view bytes) {
  if (next_ == tensors_.size()) return Internal("a tensor more than announced");
  const GgufNewTensor& tensor = tensors_[next_++];
  if (bytes.size() != tensor.bytes()) return Internal(tensor.name, " has ", bytes.size(), " bytes, not ", tensor.bytes());
  RF_RETURN_IF_ERROR(file_->Append(bytes));
  return file_->Append(std::string(Padded(bytes.size()) - bytes.size(), '\0'));
}

Status GgufWriter::Finish() { return file_->Finish(); }

}  // namespace refinery::checkpoint
