// config.json of a GPTQ folder with fixed weights: opens the folder and dequantizes every weight.
#include "worker/task/runtime/torch.h"
//
#include "tests/fuzz/fuzz_target.h"
#include "worker/task/checkpoint/model_folder.h"
#include "worker/task/checkpoint/safetensors.h"

namespace refinery::fuzz {

const char kFormat[] = "model_folder";
const TextKind kTextKind = TextKind::kJson;

std::vector<Seed> Seeds() {
  const std::string base = R"({"architectures":["LlamaForCausalLM"],"model_type":"llama","hidden_size":64,"vocab_size":8,)";
  return {{.name = "v1", .bytes = base + R"("quantization_config":{"quant_method":"gptq","bits":4,"group_size":32,"desc_act":false,)"
                                         R"("sym":true,"checkpoint_format":"gptq","dynamic":{"-:lm_head":{}}}})"},
          {.name = "v2", .bytes = base + R"("quantization_config":{"quant_method":"gptq","bits":8,"group_size":-1,"checkpoint_format":)"
                                         R"("gptq_v2","pack_dtype":"int32","meta":{"quantizer":["a:1"]}}})"}};
}

}  // namespace refinery::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace refinery;
  const std::filesystem::path folder = fuzz::InputFile(data, size, "config.json").parent_path();
  static const bool written = [&] {
    return checkpoint::WriteSafetensors(folder / "model.safetensors",
                                        {{"layer.qweight", at::full({8, 16}, 0x12345678, at::kInt)},
                                         {"layer.qzeros", at::full({2, 2}, 0x77777777, at::kInt)},
                                         {"layer.scales", at::ones({2, 16}, at::kHalf)},
                                         {"layer.g_idx", at::arange(64, at::kInt).div(32, "floor").to(at::kInt)},
                                         {"norm.weight", at::ones({64}, at::kBFloat16)}}).ok();
  }();
  if (!written) std::abort();
  auto model = checkpoint::ModelFolder::Open(folder);
  if (!model.ok()) return 0;
  ++fuzz::inputs_read;
  for (const std::string& name : (*model)->Names()) (void)(*model)->Get(name);
  (void)(*model)->ParameterCount();
  return 0;
}
