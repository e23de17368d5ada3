// worker/task/checkpoint/gguf_writer.h
//
// Writes a GGUF file (version 3, little-endian) tensor by tensor, so that a model larger than memory can be exported. The layout
// is fixed from metadata and tensor facts before the first byte of data.
//
//   RF_ASSIGN_OR_RETURN(auto writer, GgufWriter::Create(path, metadata, tensors));
//   for (tensor in the order given) RF_RETURN_IF_ERROR(writer->Append(all of its bytes));
//   RF_RETURN_IF_ERROR(writer->Finish());
//
// Source: ggml's docs/gguf.md; byte for byte what gguf-py 0.19 writes for the same metadata and tensors in the same order
// (tests/vectors/gguf_writer).
// Shapes in torch order (slowest dimension first); the file holds them the other way round. Alignment 32.
// Errors: INVALID_ARGUMENT for an unknown tensor type or rows that do not divide into its blocks; else as AtomicFile.
// Threads: one.

#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include "common/status.h"
#include "worker/task/checkpoint/atomic_file.h"
#include "worker/task/checkpoint/gguf_dequant.h"

namespace refinery::checkpoint {

// Each alternative is one of the format's types, so the C++ type chooses it.
using GgufNewValue = std::variant<uint32_t, int32_t, uint64_t, float, bool, std::string, std::vector<int32_t>, std::vector<float>,
                                  std::vector<std::string>>;
// Written in this order. An empty list is an array of no items.
using GgufNewMetadata = std::vector<std::pair<std::string, GgufNewValue>>;

// ggml's numbers of the tensor types that are written.
enum GgufTypeId : uint32_t { kGgufF32 = 0, kGgufF16 = 1, kGgufQ4_0 = 2, kGgufQ4_1 = 3, kGgufQ8_0 = 8, kGgufBf16 = 30 };

struct GgufNewTensor {
  std::string name;
  uint32_t type = kGgufF32;
  std::vector<int64_t> shape;

  // 0 when the type is unknown or the rows do not divide into its blocks.
  uint64_t bytes() const;
};

class GgufWriter {
 public:
  static StatusOr<std::unique_ptr<GgufWriter>> Create(const std::filesystem::path& path, const GgufNewMetadata& metadata,
                                                      std::vector<GgufNewTensor> tensors);

  // All bytes of the next tensor. INTERNAL when they are not as many as its shape and type say.
  Status Append(std::string_view bytes);
  Status Finish();

 private:
  GgufWriter() = default;
  std::unique_ptr<AtomicFile> file_;
  std::vector<GgufNewTensor> tensors_;
  size_t next_ = 0;
};

}  // namespace refinery::checkpoint
