// worker/task/checkpoint/safetensors.h
//
// The safetensors container: memory-mapped reading with every offset checked, atomic writing.
//
// Source: huggingface/safetensors format description: u64 little-endian header length, JSON header {name: {dtype,
// shape, data_offsets}, "__metadata__": {string: string}}, then the bytes.  Dtypes: F64 F32 F16 BF16 I64 I32 I16 I8
// U8 BOOL.
// Errors: NOT_FOUND, DATA_LOSS naming the file and the tensor.  Threads: reading is const and thread-safe.

#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "common/status.h"

namespace refinery::checkpoint {

struct TensorInfo {
  at::ScalarType dtype = at::kFloat;
  std::vector<int64_t> shape;
  uint64_t begin = 0;  // byte offsets in the file
  uint64_t end = 0;
};

class SafetensorsFile {
 public:
  static StatusOr<std::shared_ptr<SafetensorsFile>> Open(const std::filesystem::path& path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const std::map<std::string, TensorInfo>& tensors() const { return tensors_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  // A CPU tensor over the mapped bytes (read-only by convention; it keeps the mapping alive). Copied when not aligned
  // for its dtype. NOT_FOUND when the name is unknown.
  StatusOr<at::Tensor> Get(const std::string& name) const;

 private:
  struct Mapping;
  SafetensorsFile() = default;
  std::filesystem::path path_;
  std::shared_ptr<Mapping> mapping_;
  std::map<std::string, TensorInfo> tensors_;
  std::map<std::string, std::string> metadata_;
};

// Writes tensors in the order of their names; the data section starts at a multiple of 64 bytes, so that mapped
// tensors are aligned. The same tensors give the same bytes. Atomic.
Status WriteSafetensors(const std::filesystem::path& path, const std::map<std::string, at::Tensor>& tensors,
                        const std::map<std::string, std::string>& metadata = {{"format", "pt"}});

}  // namespace refinery::checkpoint
