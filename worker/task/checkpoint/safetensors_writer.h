// worker/task/checkpoint/safetensors_writer.h
//
// Writes a safetensors file tensor by tensor, so that a model larger than memory can be converted. The layout is
// fixed from names, dtypes and shapes before the first byte of data; the data section starts at a multiple of 64 bytes.
//
//   RF_ASSIGN_OR_RETURN(auto writer, SafetensorsWriter::Create(path, specs, metadata));
//   for (name in order of names) RF_RETURN_IF_ERROR(writer->Append(bytes of the tensor));
//   RF_RETURN_IF_ERROR(writer->Finish());
//
// Atomic: the file appears under its name in Finish; without it nothing is left behind.
// Errors: RESOURCE_EXHAUSTED on a full disk, UNAVAILABLE, INVALID_ARGUMENT for a dtype the format lacks.

#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"
#include "worker/task/checkpoint/atomic_file.h"

namespace refinery::checkpoint {

struct TensorSpec {
  at::ScalarType dtype = at::kFloat;
  std::vector<int64_t> shape;
};

// "BF16" and so on; empty for dtypes the format lacks.
std::string_view SafetensorsDtypeName(at::ScalarType dtype);

class SafetensorsWriter {
 public:
  static StatusOr<std::unique_ptr<SafetensorsWriter>> Create(const std::filesystem::path& path,
                                                             const std::map<std::string, TensorSpec>& specs,
                                                             const std::map<std::string, std::string>& metadata);

  // The next bytes of the data section: tensors follow each other in the order of their names.
  Status Append(std::string_view bytes);
  // INTERNAL when fewer or more bytes came than the specs say.
  Status Finish();

 private:
  SafetensorsWriter() = default;
  std::unique_ptr<AtomicFile> file_;
};

}  // namespace refinery::checkpoint
