#include "worker/task/runtime/torch.h"

#include "worker/task/export/parts.h"

#include <set>
#include <string_view>

#include "common/files.h"
#include "worker/task/checkpoint/safetensors.h"

namespace refinery::exporting {
namespace {

constexpr std::string_view kWeight = ".weight";
constexpr char kHead[] = "lm_head";

Status CheckModule(const checkpoint::ModelFolder& base, const std::string& module, const quantize::QuantizedLinear& linear) {
  if (!base.Has(module + ".weight"))
    return InvalidArgument("the quantized module ", module, " is not in ", base.path().string());
  RF_ASSIGN_OR_RETURN(const at::Tensor weight, base.Get(module + ".weight"));
  if (weight.sizes() != linear.codes.sizes())
    return InvalidArgument("the quantized module ", module, " has another shape than in ", base.path().string());
  if (!at::isfinite(linear.scales).all().item<bool>())
    return DataLoss("the quantized module ", module, " has a scale that is not finite; quantize the model again");
  return absl::OkStatus();
}

}  // namespace

QuantSettings SettingsOf(const quantize::QuantizedModel& quantized) {
  QuantSettings s{.bits = quantized.settings.bits, .group_size = quantized.settings.group_size};
  std::set<int64_t> others;
  for (const auto& [module, linear] : quantized.linears) {
    if (linear.bits != s.bits) others.insert(linear.bits);
    if (linear.zeros.defined()) s.symmetric = false;
    if (linear.group_index.defined()) s.act_order = true;
    if (module == kHead) s.head = true;
  }
  s.mixed.assign(others.begin(), others.end());
  return s;
}

Status CheckModules(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized, Format format) {
  RF_ASSIGN_OR_RETURN(const model::ModelConfig config, model::ModelConfig::FromJson(base.config()));
  RF_RETURN_IF_ERROR(CheckFormat(config, SettingsOf(quantized), format));
  for (const auto& [module, linear] : quantized.linears) RF_RETURN_IF_ERROR(CheckModule(base, module, linear));
  // Loaders replace every linear layer of the blocks: one left out would not load.
  const size_t wanted = static_cast<size_t>(config.num_layers) * 7 + quantized.linears.count(kHead);
  if (quantized.linears.size() != wanted)
    return InvalidArgument("the quantized artifact has ", quantized.linears.size(), " modules, ", base.path().string(), " has ",
                           wanted);
  return absl::OkStatus();
}

std::vector<std::string> KeptNames(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized) {
  const bool tied = base.config().value("tie_word_embeddings", false);
  std::vector<std::string> kept;
  for (const std::string& name : base.Names()) {
    if (tied && name == "lm_head.weight") continue;
    if (name.ends_with(kWeight) && quantized.linears.contains(name.substr(0, name.size() - kWeight.size()))) continue;
    kept.push_back(name);
  }
  return kept;
}

StatusOr<at::Tensor> KeptTensor(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized,
                                const std::string& name) {
  RF_ASSIGN_OR_RETURN(at::Tensor tensor, base.Get(name));
  const auto tuned = quantized.norms.find(name);
  if (tuned == quantized.norms.end()) return tensor;
  if (tuned->second.sizes() != tensor.sizes()) {
    return InvalidArgument("the quantized artifact's norm ", name, " has another shape than ", base.path().string(), "'s");
  }
  return tuned->second.to(tensor.scalar_type());
}

Status AddKept(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized, LazyTensors* tensors) {
  for (const std::string& name : KeptNames(base, quantized)) {
    RF_ASSIGN_OR_RETURN(const at::Tensor tensor, KeptTensor(base, quantized, name));
    (*tensors)[name] = {.spec = {.dtype = tensor.scalar_type(), .shape = tensor.sizes().vec()},
                        .make = [&base, &quantized, name] { return KeptTensor(base, quantized, name); }};
  }
  return absl::OkStatus();
}

Status WriteLazyTensors(const std::filesystem::path& path, const LazyTensors& tensors) {
  std::map<std::string, checkpoint::TensorSpec> specs;
  for (const auto& [name, tensor] : tensors) specs[name] = tensor.spec;
  RF_ASSIGN_OR_RETURN(const auto writer, checkpoint::SafetensorsWriter::Create(path, specs, {{"format", "pt"}}));
  for (const auto& [name, lazy] : tensors) {
    RF_ASSIGN_OR_RETURN(at::Tensor tensor, lazy.make());
    TORCH_CHECK(tensor.scalar_type() == lazy.spec.dtype && tensor.sizes() == at::IntArrayRef(lazy.spec.shape), name,
                " is not what was announced");
    tensor = tensor.cpu().contiguous();
    RF_RETURN_IF_ERROR(writer->Append({static_cast<const char*>(tensor.const_data_ptr()), tensor.nbytes()}));
  }
  return writer->Finish();
}

bool SameBytes(const at::Tensor& a, const at::Tensor& b) {
  if (a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes()) return false;
  const at::Tensor left = a.cpu().contiguous(), right = b.cpu().contiguous();
  return std::memcmp(left.const_data_ptr(), right.const_data_ptr(), left.nbytes()) == 0;
}

at::Tensor ZerosOf(const quantize::QuantizedLinear& linear) {
  if (linear.zeros.defined()) return linear.zeros.cpu();
  return at::full(linear.scales.sizes(), int64_t{1} << (linear.bits - 1), at::kByte);
}

quantize::QuantizedModel Widened(const quantize::QuantizedModel& quantized) {
  quantize::QuantizedModel wide = quantized;
  for (auto& [module, linear] : wide.linears) {
    if (linear.bits >= 4) continue;
    // code - zero stays what it is: symmetric codes move with their zero point, the others keep both.
    if (!linear.zeros.defined()) linear.codes = linear.codes + (8 - (int64_t{1} << (linear.bits - 1)));
    linear.bits = 4;
  }
  return wide;
}

Status CompareCodes(const std::string& path, const std::string& module, const quantize::QuantizedLinear& linear,
                    const at::Tensor& codes, const at::Tensor& scales, const at::Tensor& zeros) {
  const char* part = !SameBytes(codes, linear.codes)                    ? "codes"
                     : !SameBytes(scales, linear.scales)                ? "scales"
                     : !SameBytes(zeros.to(at::kByte), ZerosOf(linear)) ? "zero points"
                                                                        : nullptr;
  if (part == nullptr) return absl::OkStatus();
  return DataLoss(path, ": the ", part, " of ", module, " do not read back as they were written");
}

Status VerifyKept(const checkpoint::ModelFolder& base, const quantize::QuantizedModel& quantized,
                  const checkpoint::SafetensorsFile& file, const std::string& path, size_t count) {
  for (const std::string& name : KeptNames(base, quantized)) {
    RF_ASSIGN_OR_RETURN(const at::Tensor read, file.Get(name));
    RF_ASSIGN_OR_RETURN(const at::Tensor wanted, KeptTensor(base, quantized, name));
    if (!SameBytes(read, wanted)) return DataLoss(path, ": ", name, " does not read back as it was written");
  }
  if (file.tensors().size() != count) return DataLoss(path, ": holds ", file.tensors().size(), " tensors, not ", count);
  return absl::OkStatus();
}

ModelBytes SumBytes(const quantize::QuantizedModel& quantized, const std::vector<std::pair<std::string, uint64_t>>& tensors,
                    const std::function<bool(const std::string&)>& is_linear,
                    const std::function<bool(const std::string&)>& is_embedding) {
  ModelBytes sum;
  for (const auto& [name, bytes] : tensors) {
    sum.model += bytes;
    if (!is_embedding(name)) sum.without_embeddings += bytes;
    if (is_linear(name)) sum.linear += bytes;
  }
  for (const auto& [module, linear] : quantized.linears) sum.linear_bf16 += 2 * static_cast<uint64_t>(linear.codes.numel());
  return sum;
}

StatusOr<ModelBytes> MeasureFolder(const quantize::QuantizedModel& quantized, const std::filesystem::path& folder) {
  RF_ASSIGN_OR_RETURN(const auto file, checkpoint::SafetensorsFile::Open(folder / "model.safetensors"));
  std::vector<std::pair<std::string, uint64_t>> tensors;
  for (const auto& [name, info] : file->tensors()) tensors.emplace_back(name, info.end - info.begin);
  const auto is_linear = [&](const std::string& name) {
    return !name.ends_with(".bias") && quantized.linears.contains(name.substr(0, name.rfind('.')));
  };
  const auto is_embedding = [](const std::string& name) {
    return name.starts_with("model.embed_tokens.") || name.starts_with("lm_head.");
  };
  return SumBytes(quantized, tensors, is_linear, is_embedding);
}

Status WriteWholeFolder(const std::filesystem::path& folder,
                        const std::function<Status(const std::filesystem::path&)>& write) {
  std::filesystem::path partial = folder;
  partial += ".partial";
  std::error_code error;
  std::filesystem::remove_all(partial, error);
  RF_RETURN_IF_ERROR(CreateFolders(partial));
  if (Status status = write(partial); !status.ok()) {
    std::filesystem::remove_all(partial, error);
    return status;
  }
  RF_RETURN_IF_ERROR(SyncPath(partial));
  std::filesystem::remove_all(folder, error);
  std::filesystem::rename(partial, folder, error);
  if (error) return Unavailable("cannot name the folder ", folder.string(), ": ", error.message());
  return SyncPath(folder.has_parent_path() ? folder.parent_path() : ".");
}

}  // namespace refinery::exporting
