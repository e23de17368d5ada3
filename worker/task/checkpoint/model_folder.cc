#include "worker/task/runtime/torch.h"
//
#include "worker/task/checkpoint/model_folder.h"

#include <algorithm>
#include <set>

#include "common/files.h"

namespace refinery::checkpoint {
namespace {

using nlohmann::json;

constexpr uint64_t kMaxConfigBytes = uint64_t{64} << 20;
constexpr char kSingleFile[] = "model.safetensors";
constexpr char kIndexFile[] = "model.safetensors.index.json";
// The tensors that stand for one quantized weight, after "<prefix>.".
constexpr const char* kGptqParts[] = {"qweight", "qzeros", "scales", "g_idx"};

StatusOr<json> ReadObject(const std::filesystem::path& path) {
  RF_ASSIGN_OR_RETURN(std::string text, ReadFile(path, kMaxConfigBytes));
  json value = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!value.is_object()) return DataLoss(path.string(), " is not a JSON object");
  return value;
}

bool TakeSuffix(std::string_view name, std::string_view suffix, std::string* prefix) {
  if (name.size() <= suffix.size() || name.substr(name.size() - suffix.size()) != suffix) return false;
  *prefix = std::string(name.substr(0, name.size() - suffix.size()));
  return true;
}

}  // namespace

StatusOr<std::shared_ptr<ModelFolder>> ModelFolder::Open(const std::filesystem::path& folder) {
  std::error_code error;
  if (!std::filesystem::is_directory(folder, error)) return NotFound("no such model folder: ", folder.string());
  std::shared_ptr<ModelFolder> result(new ModelFolder);
  result->path_ = folder;
  RF_ASSIGN_OR_RETURN(result->config_, ReadObject(folder / "config.json"));
  RF_RETURN_IF_ERROR(result->OpenWeights());
  RF_RETURN_IF_ERROR(result->ReadQuantization());
  return result;
}

Status ModelFolder::OpenWeights() {
  std::error_code error;
  if (std::filesystem::exists(path_ / kSingleFile, error)) {
    RF_ASSIGN_OR_RETURN(auto file, SafetensorsFile::Open(path_ / kSingleFile));
    for (const auto& [name, info] : file->tensors()) shard_of_[name] = 0;
    shards_.push_back(std::move(file));
    weight_files_ = {kSingleFile};
    return absl::OkStatus();
  }
  if (!std::filesystem::exists(path_ / kIndexFile, error))
    return NotFound(path_.string(), " holds neither ", kSingleFile, " nor ", kIndexFile,
                    "; only safetensors weights are read");
  std::string index_name = (path_ / kIndexFile).string();
  RF_ASSIGN_OR_RETURN(json index, ReadObject(index_name));
  json map = index.value("weight_map", json());
  if (!map.is_object() || map.empty()) return DataLoss(index_name, ": weight_map is missing");
  std::map<std::string, size_t> shard_by_file;
  for (const auto& [name, file] : map.items()) {
    if (!file.is_string()) return DataLoss(index_name, ": the file of ", name, " is not text");
    std::string shard = file.get<std::string>();
    // A shard lies beside its index: a path that leads elsewhere is refused.
    if (shard.empty() || shard.find('/') != std::string::npos || shard == "." || shard == "..")
      return DataLoss(index_name, ": \"", shard, "\" is not a file name");
    auto [entry, inserted] = shard_by_file.emplace(shard, shards_.size());
    if (inserted) {
      RF_ASSIGN_OR_RETURN(auto opened, SafetensorsFile::Open(path_ / shard));
      shards_.push_back(std::move(opened));
      weight_files_.push_back(shard);
    }
    if (shards_[entry->second]->tensors().count(name) == 0)
      return DataLoss(index_name, ": ", shard, " does not hold ", name);
    shard_of_[name] = entry->second;
  }
  weight_files_.push_back(kIndexFile);
  std::sort(weight_files_.begin(), weight_files_.end());
  return absl::OkStatus();
}

Status ModelFolder::ReadQuantization() {
  auto found = config_.find("quantization_config");
  if (found == config_.end() || found->is_null()) return absl::OkStatus();
  std::string file = (path_ / "config.json").string();
  if (!found->is_object()) return DataLoss(file, ": quantization_config is not an object");
  const json& q = *found;
  json method = q.value("quant_method", json());
  if (method != "gptq")
    return InvalidArgument(file, ": quant_method ", method.dump(), " is not supported; \"gptq\" is");
  json kind = q.value("checkpoint_format", json("gptq"));
  if (kind != "gptq" && kind != "gptq_v2")
    return InvalidArgument(file, ": checkpoint_format ", kind.dump(),
                           " is not supported; \"gptq\" and \"gptq_v2\" are");
  json bits = q.value("bits", json()), group_size = q.value("group_size", json());
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8)
    return InvalidArgument(file, ": quantization_config.bits is ", bits.dump(), "; 2, 3, 4 and 8 are supported");
  if (!group_size.is_number_integer() || (group_size != -1 && group_size < 1))
    return InvalidArgument(file, ": quantization_config.group_size is ", group_size.dump());
  gptq_ = GptqFormat{.bits = bits.get<int64_t>(),
                     .group_size = group_size.get<int64_t>(),
                     .zeros_minus_one = kind == "gptq"};
  return ReadDynamic(q.value("dynamic", json()));
}

// {"+:<regex>": {"bits", "group_size", ..}}; "-:<regex>" excludes modules, which then have plain weights.
Status ModelFolder::ReadDynamic(const json& dynamic) {
  if (dynamic.is_null()) return absl::OkStatus();
  const std::string where = (path_ / "config.json").string() + ": quantization_config.dynamic";
  if (!dynamic.is_object()) return DataLoss(where, " is not an object");
  for (const auto& [key, values] : dynamic.items()) {
    if (key.starts_with("-:")) continue;
    GptqFormat format = *gptq_;
    const json bits = values.is_object() ? values.value("bits", json(format.bits)) : json();
    const json size = values.is_object() ? values.value("group_size", json(format.group_size)) : json();
    if ((bits != 2 && bits != 3 && bits != 4 && bits != 8) || !size.is_number_integer() || (size != -1 && size < 1))
      return InvalidArgument(where, "[\"", key, "\"] is ", values.dump(), "; 2, 3, 4 or 8 bits and a group size are supported");
    format.bits = bits.get<int64_t>();
    format.group_size = size.get<int64_t>();
    try {
      overrides_.emplace_back(std::regex(key.starts_with("+:") ? key.substr(2) : key), format);
    } catch (const std::regex_error& e) {
      return InvalidArgument(where, "[\"", key, "\"] is not a regular expression that is understood: ", e.what());
    }
  }
  return absl::OkStatus();
}

GptqFormat ModelFolder::GptqFormatOf(const std::string& prefix) const {
  for (const auto& [pattern, format] : overrides_)
    if (std::regex_search(prefix, pattern, std::regex_constants::match_continuous)) return format;
  return *gptq_;
}

bool ModelFolder::Has(const std::string& name) const {
  if (shard_of_.count(name) != 0) return true;
  std::string prefix;
  return gptq_ && TakeSuffix(name, ".weight", &prefix) && shard_of_.count(prefix + ".qweight") != 0;
}

std::vector<std::string> ModelFolder::Names() const {
  std::set<std::string> names;
  for (const auto& [name, shard] : shard_of_) {
    std::string prefix;
    bool is_part = false;
    if (gptq_)
      for (const char* part : kGptqParts)
        is_part = is_part || (TakeSuffix(name, Join(".", part), &prefix) && shard_of_.count(prefix + ".qweight") != 0);
    names.insert(is_part ? prefix + ".weight" : name);
  }
  return {names.begin(), names.end()};
}

StatusOr<at::Tensor> ModelFolder::GetStored(const std::string& name) const {
  auto found = shard_of_.find(name);
  if (found == shard_of_.end()) return NotFound(path_.string(), " holds no tensor ", name);
  return shards_[found->second]->Get(name);
}

StatusOr<GptqTensors> ModelFolder::GetGptq(const std::string& prefix) const {
  if (!gptq_ || shard_of_.count(prefix + ".qweight") == 0)
    return NotFound(path_.string(), " holds no quantized weight ", prefix);
  GptqTensors parts;
  RF_ASSIGN_OR_RETURN(parts.qweight, GetStored(prefix + ".qweight"));
  RF_ASSIGN_OR_RETURN(parts.qzeros, GetStored(prefix + ".qzeros"));
  RF_ASSIGN_OR_RETURN(parts.scales, GetStored(prefix + ".scales"));
  if (shard_of_.count(prefix + ".g_idx") != 0) {
    RF_ASSIGN_OR_RETURN(parts.g_idx, GetStored(prefix + ".g_idx"));
  }
  return parts;
}

StatusOr<at::Tensor> ModelFolder::Get(const std::string& name) const {
  std::string prefix;
  if (!gptq_ || shard_of_.count(name) != 0 || !TakeSuffix(name, ".weight", &prefix) ||
      shard_of_.count(prefix + ".qweight") == 0)
    return GetStored(name);
  RF_ASSIGN_OR_RETURN(const GptqTensors parts, GetGptq(prefix));
  StatusOr<at::Tensor> weight = DequantizeGptq(parts, GptqFormatOf(prefix));
  if (!weight.ok()) return Annotate(weight.status(), Join(path_.string(), ": ", prefix));
  return weight;
}

uint64_t ModelFolder::ParameterCount() const {
  uint64_t total = 0;
  for (const auto& [name, shard] : shard_of_) {
    uint64_t count = 1;
    for (int64_t size : shards_[shard]->tensors().at(name).shape) count *= static_cast<uint64_t>(size);
    std::string prefix;
    if (gptq_ && TakeSuffix(name, ".qweight", &prefix)) {
      count = count * 32 / static_cast<uint64_t>(GptqFormatOf(prefix).bits);
    } else if (gptq_ && ((TakeSuffix(name, ".qzeros", &prefix) || TakeSuffix(name, ".scales", &prefix) ||
                          TakeSuffix(name, ".g_idx", &prefix)) &&
                         shard_of_.count(prefix + ".qweight") != 0)) {
      count = 0;
    }
    total += count;
  }
  return total;
}

}  // namespace refinery::checkpoint
