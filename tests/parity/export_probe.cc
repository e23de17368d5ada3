// Rounds a model to the nearest grid and writes it in every format named, for exports.py to load with the peers:
//
//   export_probe MODEL OUT --bits 4 --group-size 64 --grid full_range --mixed 8 --formats gptq,gguf [--q8-embeddings] [--weights]
//
// MODEL is a Hugging Face folder. --mixed B: down_proj of even layers gets B bits. Writes OUT/<format>/ and prints the bytes;
// --weights: also OUT/weights.safetensors, the dequantized weights of the first two layers in float32.

#include "worker/task/runtime/torch.h"

#include <CLI/CLI.hpp>
#include <cstdio>

#include "worker/task/checkpoint/safetensors.h"
#include "worker/task/export/export.h"
#include "worker/task/model/causal_lm.h"
#include "worker/task/quantize/model_quantizer.h"

namespace refinery {
namespace {

struct Options {
  std::string model, out, grid = "full_range";
  std::vector<std::string> formats = {"gptq"};
  int64_t bits = 4, group_size = 64, mixed = 0;
  bool q8_embeddings = false, weights = false;
};

// The layers of the other width, rounded from the source's weights.
Status Mix(const checkpoint::ModelFolder& base, const quantize::GptqSettings& settings, quantize::QuantizedModel* quantized) {
  for (auto& [module, linear] : quantized->linears) {
    const std::string number = module.substr(std::string("model.layers.").size());
    if (!module.ends_with("down_proj") || std::stoi(number) % 2 != 0) continue;
    RF_ASSIGN_OR_RETURN(const at::Tensor weight, base.Get(module + ".weight"));
    linear = quantize::RoundToNearest(weight.to(at::kBFloat16), settings);
  }
  return absl::OkStatus();
}

Status WriteWeights(const quantize::QuantizedModel& quantized, const std::filesystem::path& path) {
  std::map<std::string, at::Tensor> weights;
  for (const auto& [module, linear] : quantized.linears)
    if (module.starts_with("model.layers.0.") || module.starts_with("model.layers.1.")) weights[module] = linear.Dequantize();
  return checkpoint::WriteSafetensors(path, weights);
}

Status Run(const Options& o) {
  c10::InferenceMode inference;
  RF_ASSIGN_OR_RETURN(const auto base, checkpoint::ModelFolder::Open(o.model));
  RF_ASSIGN_OR_RETURN(const auto model, model::CausalLm::Load(*base, {.dtype = at::kBFloat16}));
  quantize::GptqSettings settings{.bits = o.bits, .group_size = o.group_size};
  settings.grid = o.grid == "asymmetric" ? quantize::Grid::kAsymmetric
                  : o.grid == "symmetric" ? quantize::Grid::kSymmetric
                                          : quantize::Grid::kFullRange;
  quantize::QuantizedModel quantized = quantize::RoundModelToNearest(*model, settings);
  if (o.mixed != 0) {
    settings.bits = o.mixed;
    RF_RETURN_IF_ERROR(Mix(*base, settings, &quantized));
  }
  if (o.weights) RF_RETURN_IF_ERROR(WriteWeights(quantized, std::filesystem::path(o.out) / "weights.safetensors"));
  const exporting::ModelCard card{.name = "probe"};
  RF_ASSIGN_OR_RETURN(const std::vector<exporting::Format> formats, exporting::FormatsOf(o.formats));
  for (const exporting::Format format : formats) {
    const std::filesystem::path folder = std::filesystem::path(o.out) / exporting::FormatName(format);
    if (format == exporting::Format::kGguf) {
      RF_RETURN_IF_ERROR(exporting::ExportGgufFolder(*base, quantized, card, {.embeddings_q8_0 = o.q8_embeddings}, folder));
    } else if (format == exporting::Format::kCompressedTensors) {
      RF_RETURN_IF_ERROR(exporting::ExportCompressedTensorsFolder(*base, quantized, card, folder));
    } else {
      RF_RETURN_IF_ERROR(exporting::ExportGptqFolder(*base, quantized, card, folder, format));
    }
    RF_ASSIGN_OR_RETURN(const exporting::ModelBytes bytes, exporting::BytesOf(folder));
    std::printf("%s model %llu without_embeddings %llu linear_ratio %.4f\n", std::string(exporting::FormatName(format)).c_str(),
                static_cast<unsigned long long>(bytes.model), static_cast<unsigned long long>(bytes.without_embeddings),
                bytes.linear_ratio());
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace refinery

int main(int argc, char** argv) {
  refinery::Options options;
  CLI::App app{"Exports a rounded model."};
  app.add_option("MODEL", options.model)->required();
  app.add_option("OUT", options.out)->required();
  app.add_option("--bits", options.bits);
  app.add_option("--group-size", options.group_size);
  app.add_option("--grid", options.grid)->check(CLI::IsMember({"full_range", "symmetric", "asymmetric"}));
  app.add_option("--mixed", options.mixed);
  app.add_option("--formats", options.formats)->delimiter(',');
  app.add_flag("--q8-embeddings", options.q8_embeddings);
  app.add_flag("--weights", options.weights);
  CLI11_PARSE(app, argc, argv);
  const refinery::Status status = refinery::Run(options);
  if (status.ok()) return 0;
  std::fprintf(stderr, "export_probe: %s\n", refinery::Message(status).c_str());
  return 2;
}
