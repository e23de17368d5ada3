// adapter_config.json of a PEFT folder with fixed weights: loads the adapter, stacks it on itself and merges it.
#include "worker/task/runtime/torch.h"
//
#include "tests/fuzz/fuzz_target.h"
#include "worker/task/checkpoint/peft_adapter.h"
#include "worker/task/checkpoint/safetensors.h"

namespace refinery::fuzz {

const char kFormat[] = "peft";
const TextKind kTextKind = TextKind::kJson;

std::vector<Seed> Seeds() {
  return {{.name = "plain", .bytes = R"({"peft_type":"LORA","task_type":"CAUSAL_LM","r":2,"lora_alpha":4,"lora_dropout":0.0,)"
                                     R"("target_modules":["q_proj"],"bias":"none","base_model_name_or_path":"base","fan_in_fan_out":false})"},
          {.name = "patterns", .bytes = R"({"peft_type":"LORA","r":4,"lora_alpha":8.5,"use_rslora":true,"target_modules":"all-linear",)"
                                        R"("rank_pattern":{"q_proj":2},"alpha_pattern":{"model.layers.0.self_attn.q_proj":16},)"
                                        R"("modules_to_save":null,"use_dora":false,"layers_to_transform":null})"}};
}

}  // namespace refinery::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace refinery;
  const std::filesystem::path folder = fuzz::InputFile(data, size, "adapter_config.json").parent_path();
  static const bool written = [&] {
    const std::string name = "base_model.model.model.layers.0.self_attn.q_proj.lora_";
    return checkpoint::WriteSafetensors(folder / "adapter_model.safetensors", {{name + "A.weight", at::ones({2, 8})},
                                                                               {name + "B.weight", at::ones({6, 2})}}).ok();
  }();
  if (!written) std::abort();
  auto adapter = checkpoint::LoadPeftAdapter(folder);
  if (!adapter.ok()) return 0;
  ++fuzz::inputs_read;
  auto stacked = checkpoint::StackAdapters({*adapter, *adapter});
  if (!stacked.ok()) return 0;
  for (const auto& [module, pair] : stacked->pairs) (void)checkpoint::MergeLora(at::zeros({6, 8}), pair, stacked->scale());
  return 0;
}
