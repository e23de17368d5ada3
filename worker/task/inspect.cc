#include "worker/task/inspect.h"

#include "worker/task/runtime/torch.h"

#include <cstdio>

#include "common/files.h"
#include "worker/task/checkpoint/import.h"
#include "worker/task/checkpoint/safetensors.h"
#include "worker/task/generate/engine.h"
#include "worker/task/model/causal_lm.h"
#include "worker/task/runtime/device.h"
#include "worker/task/start.h"
#include "worker/task/tokenizer/tokenizer.h"

namespace refinery::task {
namespace {

StatusOr<std::vector<std::vector<int32_t>>> ReadPrompts(const std::string& file, const std::filesystem::path& model) {
  RF_ASSIGN_OR_RETURN(std::string text, ReadFile(file));
  nlohmann::json json = nlohmann::json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!json.is_array()) return InvalidArgument(file, " is not a JSON list of prompts");
  std::shared_ptr<const tokenizer::Tokenizer> tokenizer;
  std::vector<std::vector<int32_t>> prompts;
  for (const nlohmann::json& prompt : json) {
    if (prompt.is_string()) {
      if (tokenizer == nullptr) {
        RF_ASSIGN_OR_RETURN(tokenizer, tokenizer::Tokenizer::Load(model));
      }
      RF_ASSIGN_OR_RETURN(std::vector<int32_t> ids, tokenizer->Encode(prompt.get<std::string>()));
      prompts.push_back(std::move(ids));
    } else if (prompt.is_array() && !prompt.empty() && prompt[0].is_number_integer()) {
      prompts.push_back(prompt.get<std::vector<int32_t>>());
    } else {
      return InvalidArgument(file, ": prompt ", prompts.size(), " is neither a string nor a list of token ids");
    }
  }
  return prompts;
}

// Bytes of the tensors that the model holds, each storage once.
size_t WeightBytes(model::CausalLm& lm) {
  std::map<const void*, size_t> storages;
  const auto count = [&](const at::Tensor& t) {
    if (t.defined()) storages[t.storage().data()] = t.storage().nbytes();
  };
  for (const at::Tensor& t : {lm.embed_tokens, lm.lm_head, lm.final_norm}) count(t);
  for (model::DecoderLayer& layer : lm.layers) {
    for (const at::Tensor& t : {layer.input_norm, layer.post_attention_norm, layer.q_norm, layer.k_norm}) count(t);
    for (const model::Linear* linear : layer.Linears()) {
      count(linear->weight);
      count(linear->bias);
    }
  }
  size_t total = 0;
  for (const auto& [storage, bytes] : storages) total += bytes;
  return total;
}

void PrintMemory(model::CausalLm& lm) {
  const double weights = static_cast<double>(WeightBytes(lm)) / (1 << 20);
  const double peak = static_cast<double>(runtime::PeakMemoryBytes()) / (1 << 20);
  std::printf("weights %.1f MiB, peak resident memory %.1f MiB, ratio %.3f\n", weights, peak, peak / weights);
}

}  // namespace

Status Inspect(const InspectOptions& options) {
  c10::InferenceMode inference;
  RF_ASSIGN_OR_RETURN(checkpoint::ModelRef ref, checkpoint::ImportModel(options.model, CacheFolder(options.cache)));
  RF_ASSIGN_OR_RETURN(std::filesystem::path path, checkpoint::ResolveModel(ref, CacheFolder(options.cache)));
  RF_ASSIGN_OR_RETURN(auto folder, checkpoint::ModelFolder::Open(path));
  at::ScalarType dtype = options.dtype == "bfloat16" ? at::kBFloat16 : at::kFloat;
  RF_ASSIGN_OR_RETURN(std::shared_ptr<model::CausalLm> lm,
                      model::CausalLm::Load(*folder, {.dtype = dtype, .device = runtime::DefaultDevice()}));
  if (options.memory) PrintMemory(*lm);
  if (options.prompts.empty()) return absl::OkStatus();
  if (!options.adapters.empty()) {
    std::vector<checkpoint::PeftAdapter> adapters(options.adapters.size());
    for (size_t i = 0; i < adapters.size(); ++i) {
      RF_ASSIGN_OR_RETURN(adapters[i], checkpoint::LoadPeftAdapter(options.adapters[i]));
    }
    RF_ASSIGN_OR_RETURN(checkpoint::PeftAdapter adapter, checkpoint::StackAdapters(adapters));
    RF_RETURN_IF_ERROR(lm->AttachAdapter(adapter));
  }
  RF_ASSIGN_OR_RETURN(std::vector<std::vector<int32_t>> prompts, ReadPrompts(options.prompts, path));

  std::map<std::string, at::Tensor> logits;
  std::vector<generate::Request> requests;
  for (size_t i = 0; i < prompts.size(); ++i) {
    auto length = static_cast<int64_t>(prompts[i].size());
    at::Tensor ids = at::tensor(std::vector<int64_t>(prompts[i].begin(), prompts[i].end()), at::kLong).to(lm->device());
    logits[Join("logits.", i)] = lm->Logits(lm->Hidden({.token_ids = ids, .lengths = {length}})).to(at::kFloat).cpu();
    requests.push_back({.prompt = prompts[i], .max_new_tokens = options.max_new_tokens, .sampling = {.temperature = 0}});
  }
  RF_RETURN_IF_ERROR(CreateFolders(options.output));
  std::filesystem::path output = options.output;
  RF_RETURN_IF_ERROR(checkpoint::WriteSafetensors(output / "logits.safetensors", logits));
  nlohmann::json tokens = {{"model", path.string()}, {"prompts", prompts}, {"greedy", nlohmann::json::array()}};
  if (options.max_new_tokens > 0) {
    runtime::NullReporter quiet;
    generate::Engine engine(lm, {});
    RF_ASSIGN_OR_RETURN(const std::vector<generate::Completion> completions, engine.Generate(requests, quiet));
    for (const generate::Completion& completion : completions) tokens["greedy"].push_back(completion.tokens);
  }
  return WriteFileAtomically(output / "tokens.json", tokens.dump() + "\n");
}

}  // namespace refinery::task
