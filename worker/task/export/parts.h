// worker/task/export/parts.h
//
// What the folders of quantized models have in common: which tensors of the base model stay, which settings the quantized
// layers have, files written tensor by tensor, and folders that appear only when they are complete.
//
// Errors: absl::Status naming module or file.  Threads: functions.

#pragma once

#include <ATen/core/Tensor.h>

#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/checkpoint/model_folder.h"
#include "worker/task/checkpoint/safetensors_writer.h"
#include "worker/task/export/export.h"
#include "worker/task/export/loader_lint.h"
#include "worker/task/quantize/model_quantizer.h"

namespace refinery::exporting {

// What the quantized layers really are: widths, zero points and order of their codes.
QuantSettings SettingsOf(const quantize::QuantizedModel& quantized);

// INVALID_ARGUMENT when the modules are not exactly the linear layers of `base` (an untied head may be among them) or the format
// cannot hold them; DATA_LOSS when a scale is not finite.
Status CheckModules(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized, Format format);

// The names of `base` that are written as they are: all but quantized weights and the copy of tied embeddings.
std::vector<std::string> KeptNames(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized);
StatusOr<at::Tensor> KeptTensor(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized,
                                const std::string& name);

// A tensor that is made when its turn comes, so that no file has to fit into memory.
struct LazyTensor {
  checkpoint::TensorSpec spec;
  std::function<StatusOr<at::Tensor>()> make;
};
using LazyTensors = std::map<std::string, LazyTensor>;
Status AddKept(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized, LazyTensors* tensors);
Status WriteLazyTensors(const std::filesystem::path& path, const LazyTensors& tensors);

// The bytes, dtypes and shapes are equal.
bool SameBytes(const at::Tensor& a, const at::Tensor& b);
// DATA_LOSS naming file and module unless codes, scales and zero points [out, groups] are those of `linear`.
Status CompareCodes(const std::string& path, const std::string& module, const quantize::QuantizedLinear& linear,
                    const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zeros);
// Every kept tensor as it was written, and no more tensors than `count`.
Status VerifyKept(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized,
                  const checkpoint::SafetensorsFile& file, const std::string& path, size_t count);

// Sums over (name, bytes) of a file's tensors; what the functions say of a name: part of a quantized weight, of embeddings or head.
ModelBytes SumBytes(const quantize::QuantizedModel& quantized, const std::vector<std::pair<std::string, uint64_t>>& tensors,
                    const std::function<bool(const std::string&)>& is_linear,
                    const std::function<bool(const std::string&)>& is_embedding);
// Of model.safetensors in `folder`: tensors are named after their modules.
StatusOr<ModelBytes> MeasureFolder(const quantize::QuantizedModel& quantized, const std::filesystem::path& folder);

// The quantized model as formats with 4 and 8 bits only hold it: layers of 2 and 3 bits become layers of 4 with the same weights.
quantize::QuantizedModel Widened(const quantize::QuantizedModel& quantized);

// The zero points, [out, groups] uint8, written out where they are implied.
at::Tensor ZerosOf(const quantize::QuantizedLinear& linear);

// Runs `write` on a folder beside `folder`, which is then synced and takes its name. What had that name goes.
Status WriteWholeFolder(const std::filesystem::path& folder,
                        const std::function<Status(const std::filesystem::path&)>& write);

}  // namespace refinery::exporting
