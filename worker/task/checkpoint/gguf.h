// worker/task/checkpoint/gguf.h
//
// GGUF files (llama.cpp's model format), memory-mapped, versions 2 and 3, little-endian. Every length, count and
// offset is checked before it is used.
//
// Source: ggml's docs/gguf.md. Layout: "GGUF", version, tensor count, metadata count; metadata (key, type, value);
// tensor facts (name, dimensions with the fastest first, type, offset); padding to general.alignment; data.
// Shapes here are in torch order (slowest dimension first).
// Errors: NOT_FOUND, DATA_LOSS for corrupt bytes, INVALID_ARGUMENT for what this version of Refinery does not read;
// each names the file.  Threads: const methods are thread-safe.

#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "common/status.h"
#include "worker/task/checkpoint/gguf_dequant.h"
#include "worker/task/checkpoint/mapped_file.h"

namespace refinery::checkpoint {

struct GgufTensor {
  std::string name;
  const GgufType* type = nullptr;
  std::vector<int64_t> shape;  // torch order, at least one dimension
  uint64_t begin = 0;          // byte offsets in the file
  uint64_t end = 0;

  int64_t row_size() const { return shape.back(); }  // elements of the fastest dimension
  int64_t rows() const;
};

// A metadata value. Strings point into the mapped file and are valid UTF-8.
using GgufValue = std::variant<int64_t, uint64_t, double, bool, std::string_view, std::vector<int64_t>,
                               std::vector<double>, std::vector<std::string_view>>;

class GgufFile {
 public:
  static StatusOr<std::shared_ptr<const GgufFile>> Open(const std::filesystem::path& path);

  const std::filesystem::path& path() const { return file_->path(); }
  const std::map<std::string, GgufValue>& metadata() const { return metadata_; }
  const std::map<std::string, GgufTensor>& tensors() const { return tensors_; }
  // nullptr when there is no such tensor.
  const GgufTensor* Find(const std::string& name) const;

  // Metadata by key: nullopt when it is absent or of another kind. Integers of any width; Float also takes integers.
  std::optional<int64_t> Int(const std::string& key) const;
  std::optional<double> Float(const std::string& key) const;
  std::optional<bool> Bool(const std::string& key) const;
  std::optional<std::string_view> String(const std::string& key) const;
  const std::vector<std::string_view>* Strings(const std::string& key) const;
  const std::vector<int64_t>* Ints(const std::string& key) const;

  const uint8_t* Data(const GgufTensor& tensor) const { return file_->data() + tensor.begin; }
  // Rows [first, first + count) as float32, exactly as ggml defines them. `out` holds count * row_size() floats.
  void DequantizeRows(const GgufTensor& tensor, int64_t first, int64_t count, float* out) const;
  // Gives the tensor's mapped pages back; they are mapped again when they are read again.
  void Release(const GgufTensor& tensor) const { file_->Release(tensor.begin, tensor.end); }
  // The whole tensor in float32, computed on all threads. NOT_FOUND.
  StatusOr<at::Tensor> Dequantize(const std::string& name) const;

 private:
  GgufFile() = default;
  std::shared_ptr<const MappedFile> file_;
  std::map<std::string, GgufValue> metadata_;
  std::map<std::string, GgufTensor> tensors_;
};

}  // namespace refinery::checkpoint
