#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <filesystem>
#include <fstream>

#include "tests/worker/task/model/tiny_models.h"

namespace refinery::model {
namespace {

// The shape of a tensor, from its name: what transformers names so.
std::vector<int64_t> ShapeOf(const ModelConfig& c, const std::string& name) {
  const auto has = [&](const char* part) { return name.find(part) != std::string::npos; };
  const bool bias = has(".bias");
  const auto shape = [&](int64_t out, int64_t in) { return bias ? std::vector<int64_t>{out} : std::vector<int64_t>{out, in}; };
  if (has("embed_tokens") || has("lm_head")) return {c.vocab_size, c.hidden_size};
  if (has("q_norm") || has("k_norm")) return {c.head_dim};
  if (has("norm")) return {c.hidden_size};
  if (has("q_proj")) return shape(c.num_heads * c.head_dim, c.hidden_size);
  if (has("k_proj") || has("v_proj")) return shape(c.num_kv_heads * c.head_dim, c.hidden_size);
  if (has("o_proj")) return shape(c.hidden_size, c.num_heads * c.head_dim);
  if (has("down_proj")) return shape(c.hidden_size, c.intermediate_size);
  return shape(c.intermediate_size, c.hidden_size);
}

template <typename T>
T Check(StatusOr<T> value) {
  TORCH_CHECK(value.ok(), Message(value.status()));
  return *std::move(value);
}

}  // namespace

nlohmann::json TinyVectors(const std::string& name) {
  std::ifstream file(std::string(REFINERY_SOURCE_DIR) + "/tests/vectors/model/" + name + ".json");
  return nlohmann::json::parse(file);
}

ModelConfig TinyConfig(const nlohmann::json& vectors) { return Check(ModelConfig::FromJson(vectors.at("config"))); }

TensorSource TinyWeights(const nlohmann::json& vectors) {
  const ModelConfig config = TinyConfig(vectors);
  const int64_t seed = vectors.at("seed").get<int64_t>();
  return [config, seed](const std::string& name) -> StatusOr<at::Tensor> {
    uint64_t state = 0xCBF29CE484222325u;
    for (const char c : std::to_string(seed) + "/" + name) {
      state = (state ^ static_cast<unsigned char>(c)) * 0x100000001B3u;
    }
    const at::Tensor values = at::empty(ShapeOf(config, name), at::kDouble);
    for (int64_t i = 0; i < values.numel(); ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      values.data_ptr<double>()[i] = static_cast<double>(state >> 40) / 8388608.0 - 1;
    }
    const auto has = [&](const char* part) { return name.find(part) != std::string::npos; };
    const double amplitude = has("norm") || has(".bias") ? 0.2 : has("embed") ? 1.0 : 0.35;
    return (values * amplitude + (has("norm") ? 1 : 0)).to(at::kBFloat16).to(at::kFloat);
  };
}

std::shared_ptr<CausalLm> TinyModel(const nlohmann::json& vectors, at::ScalarType dtype) {
  return Check(CausalLm::Load(TinyConfig(vectors), TinyWeights(vectors), {.dtype = dtype}));
}

std::string StoriesFolder() {
  const std::string folder = std::string(REFINERY_SOURCE_DIR) + "/../shared/data/models/stories260K";
  return std::filesystem::exists(folder + "/golden.json") ? folder : "";
}

std::shared_ptr<CausalLm> StoriesModel(at::ScalarType dtype) {
  const std::string folder = StoriesFolder() + "/hf/";
  std::ifstream config_file(folder + "config.json"), weights(folder + "model.safetensors", std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(weights), {}};
  uint64_t header_size = 0;
  std::memcpy(&header_size, bytes.data(), sizeof(header_size));
  const nlohmann::json header = nlohmann::json::parse(bytes.substr(8, header_size));
  const TensorSource source = [&](const std::string& name) -> StatusOr<at::Tensor> {
    if (!header.contains(name)) return NotFound(name);
    const uint64_t begin = header[name]["data_offsets"][0].get<uint64_t>();
    const at::Tensor tensor = at::empty(header[name]["shape"].get<std::vector<int64_t>>(), at::kFloat);
    TORCH_CHECK(header[name]["dtype"] == "F32");
    std::memcpy(tensor.data_ptr(), bytes.data() + 8 + header_size + begin, tensor.nbytes());
    return tensor;
  };
  return Check(CausalLm::Load(Check(ModelConfig::FromJson(nlohmann::json::parse(config_file))), source, {.dtype = dtype}));
}

PackedBatch Pack(const std::vector<std::vector<int64_t>>& sequences) {
  PackedBatch batch;
  std::vector<int64_t> ids;
  for (const std::vector<int64_t>& sequence : sequences) {
    ids.insert(ids.end(), sequence.begin(), sequence.end());
    batch.lengths.push_back(static_cast<int64_t>(sequence.size()));
  }
  batch.token_ids = at::tensor(ids, at::kLong);
  return batch;
}

}  // namespace refinery::model
