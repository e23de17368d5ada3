#include "worker/task/runtime/torch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "common/digest.h"
#include "common/files.h"
#include "tests/support/status_matchers.h"
#include "tests/worker/task/quantize/tiny_model.h"
#include "worker/task/checkpoint/safetensors.h"
#include "worker/task/export/export.h"
#include "worker/task/quantize/model_quantizer.h"

namespace refinery::exporting {
namespace {

using ::refinery::testing::IsOk;
using ::refinery::testing::StatusIs;
using ::refinery::testing::TinyConfig;
using ::refinery::testing::TinyModel;
using ::refinery::testing::TinyTensors;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

const ModelCard kCard{.name = "tiny | refined", .base_model = "acme/tiny", .license = "apache-2.0",
                      .recipe = "student: {model: tiny}\n", .measurements = {{"perplexity", "7.1 +- 0.2"}}};

std::filesystem::path FreshFolder(const std::string& name) {
  const std::filesystem::path folder = std::filesystem::path(::testing::TempDir()) / ("export_test_" + name);
  std::filesystem::remove_all(folder);
  std::filesystem::create_directories(folder);
  return folder;
}

struct Fixture {
  std::map<std::string, at::Tensor> tensors = TinyTensors(at::kBFloat16);
  std::filesystem::path path;
  std::shared_ptr<checkpoint::ModelFolder> base;
  quantize::QuantizedModel quantized;
};

// A model folder whose file also holds the tied copy of the embeddings, as some published ones do.
Fixture MakeFixture(const std::string& name, int64_t bits = 4) {
  Fixture f;
  f.path = FreshFolder(name + "_base");
  auto stored = f.tensors;
  stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone();
  EXPECT_THAT(checkpoint::WriteSafetensors(f.path / "model.safetensors", stored), IsOk());
  EXPECT_THAT(WriteFileAtomically(f.path / "config.json", TinyConfig().dump()), IsOk());
  EXPECT_THAT(WriteFileAtomically(f.path / "generation_config.json", "{\"eos_token_id\": 2}"), IsOk());
  EXPECT_THAT(WriteFileAtomically(f.path / "tokenizer.json", "{\"version\": \"1.0\"}"), IsOk());
  EXPECT_THAT(WriteFileAtomically(f.path / "tokenizer_config.json", "{\"chat_template\": \"x\"}"), IsOk());
  EXPECT_THAT(WriteFileAtomically(f.path / "pickle.bin", "never copied"), IsOk());
  f.base = checkpoint::ModelFolder::Open(f.path).value();
  const auto model = TinyModel(f.tensors, at::kBFloat16);
  f.quantized = quantize::RoundModelToNearest(*model, {.bits = bits, .group_size = 32});
  return f;
}

std::vector<std::string> Paths(const std::filesystem::path& folder) {
  const auto files = ListFolder(folder).value();
  std::vector<std::string> paths;
  for (const FileEntry& file : files) paths.push_back(file.path);
  std::sort(paths.begin(), paths.end());
  return paths;
}

void FlipByte(const std::filesystem::path& path, int64_t from_end) {
  std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
  file.seekg(-from_end, std::ios::end);
  const char byte = static_cast<char>(file.get() ^ 0x10);
  file.seekp(-from_end, std::ios::end);
  file.put(byte);
}

TEST(GptqFolderTest, HoldsWhatLoadersExpect) {
  const Fixture f = MakeFixture("gptq");
  const std::filesystem::path folder = FreshFolder("gptq");
  ASSERT_THAT(ExportGptqFolder(*f.base, f.quantized, kCard, folder), IsOk());
  EXPECT_THAT(Paths(folder), ::testing::ElementsAre("README.md", "config.json", "generation_config.json", "manifest.json",
                                                    "model.safetensors", "quantize_config.json", "tokenizer.json",
                                                    "tokenizer_config.json"));
  const auto config = nlohmann::json::parse(ReadFile(folder / "config.json").value());
  EXPECT_EQ(config.at("hidden_size"), 64);
  EXPECT_EQ(config.at("tie_word_embeddings"), true);
  const nlohmann::json& q = config.at("quantization_config");
  EXPECT_EQ(q.at("quant_method"), "gptq");
  EXPECT_EQ(q.at("checkpoint_format"), "gptq");
  EXPECT_EQ(q.at("bits"), 4);
  EXPECT_EQ(q.at("group_size"), 32);
  EXPECT_EQ(q.at("desc_act"), false);
  EXPECT_EQ(q.at("sym"), true);
  EXPECT_EQ(q.at("lm_head"), false);
  EXPECT_GT(q.at("damp_percent").get<double>(), 0);
  EXPECT_TRUE(q.at("meta").at("quantizer").is_array());
  EXPECT_EQ(nlohmann::json::parse(ReadFile(folder / "quantize_config.json").value()), q);

  const auto file = checkpoint::SafetensorsFile::Open(folder / "model.safetensors").value();
  EXPECT_EQ(file->metadata().at("format"), "pt");
  EXPECT_FALSE(file->tensors().contains("lm_head.weight"));
  EXPECT_FALSE(file->tensors().contains("model.layers.0.mlp.up_proj.weight"));
  EXPECT_EQ(file->tensors().at("model.embed_tokens.weight").dtype, at::kBFloat16);
  EXPECT_EQ(file->tensors().at("model.layers.0.mlp.down_proj.qweight").shape, (std::vector<int64_t>{12, 64}));
  EXPECT_EQ(file->tensors().at("model.layers.0.mlp.down_proj.qzeros").shape, (std::vector<int64_t>{3, 8}));
  EXPECT_EQ(file->tensors().at("model.layers.0.mlp.down_proj.scales").shape, (std::vector<int64_t>{3, 64}));
  const at::Tensor zeros = file->Get("model.layers.0.mlp.down_proj.qzeros").value();
  EXPECT_TRUE(zeros.eq(0x77777777).all().item<bool>());

  const std::string card = ReadFile(folder / "README.md").value();
  EXPECT_THAT(card, AllOf(HasSubstr("base_model: \"acme/tiny\""), HasSubstr("tiny \\| refined"), HasSubstr("7.1 +- 0.2"),
                          HasSubstr("student: {model: tiny}"), Not(HasSubstr(f.path.string()))));
}

// Goal: the folder is a model to our own reader too, at every width.  Method: the dequantized weights, which the packing
// tests check against an independent packer.
TEST(GptqFolderTest, OpensAsAModelFolderWithTheDequantizedWeights) {
  for (const int64_t bits : {2, 3, 4, 8}) {
    const Fixture f = MakeFixture("open", bits);
    const std::filesystem::path folder = FreshFolder("open");
    ASSERT_THAT(ExportGptqFolder(*f.base, f.quantized, kCard, folder), IsOk());
    const auto opened = checkpoint::ModelFolder::Open(folder);
    ASSERT_THAT(opened, IsOk());
    for (const auto& [module, linear] : f.quantized.linears) {
      const auto weight = (*opened)->Get(module + ".weight");
      ASSERT_THAT(weight, IsOk());
      EXPECT_TRUE(at::equal(weight->to(at::kFloat), linear.Dequantize())) << bits << " bits, " << module;
    }
  }
}

// Goal: norms that recovery tuned take the place of the base model's, in its dtype; all else stays.
TEST(GptqFolderTest, HoldsTunedNorms) {
  Fixture f = MakeFixture("norms");
  const at::Tensor tuned = at::linspace(0.5, 2, 64, at::kFloat).to(at::kBFloat16);
  f.quantized.norms["model.layers.1.input_layernorm.weight"] = tuned;
  const std::filesystem::path folder = FreshFolder("norms");
  ASSERT_THAT(ExportGptqFolder(*f.base, f.quantized, kCard, folder), IsOk());
  ASSERT_THAT(VerifyGptqFolder(*f.base, f.quantized, folder), IsOk());
  const auto file = checkpoint::SafetensorsFile::Open(folder / "model.safetensors").value();
  EXPECT_TRUE(at::equal(file->Get("model.layers.1.input_layernorm.weight").value(), tuned));
  EXPECT_TRUE(at::equal(file->Get("model.layers.0.input_layernorm.weight").value(),
                        f.base->Get("model.layers.0.input_layernorm.weight").value()));
  f.quantized.norms["model.layers.1.input_layernorm.weight"] = at::ones({63});
  EXPECT_THAT(ExportGptqFolder(*f.base, f.quantized, kCard, FreshFolder("norms2")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("another shape")));
}

TEST(GptqFolderTest, SameInputsGiveTheSameBytes) {
  const Fixture f = MakeFixture("same");
  const std::filesystem::path a = FreshFolder("same_a"), b = FreshFolder("same_b");
  ASSERT_THAT(ExportGptqFolder(*f.base, f.quantized, kCard, a), IsOk());
  ASSERT_THAT(ExportGptqFolder(*f.base, f.quantized, kCard, b), IsOk());
  EXPECT_EQ(ManifestText(ListFolder(a).value()), ManifestText(ListFolder(b).value()));
}

TEST(GptqFolderTest, ReadingBackFindsOneChangedBit) {
  const Fixture f = MakeFixture("changed");
  const std::filesystem::path folder = FreshFolder("changed");
  ASSERT_THAT(ExportGptqFolder(*f.base, f.quantized, kCard, folder), IsOk());
  ASSERT_THAT(VerifyGptqFolder(*f.base, f.quantized, folder), IsOk());
  FlipByte(folder / "model.safetensors", 3);
  EXPECT_THAT(VerifyGptqFolder(*f.base, f.quantized, folder), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("model.")));
}

TEST(GptqFolderTest, RefusesModulesThatAreNotTheModels) {
  Fixture f = MakeFixture("refuse");
  const std::filesystem::path folder = FreshFolder("refuse");
  quantize::QuantizedModel other = f.quantized;
  other.linears.erase("model.layers.0.mlp.up_proj");
  EXPECT_THAT(ExportGptqFolder(*f.base, other, kCard, folder),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("13 modules")));
  other = f.quantized;
  other.settings.bits = 5;
  EXPECT_THAT(ExportGptqFolder(*f.base, other, kCard, folder), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("5 bits")));
  other = f.quantized;
  quantize::QuantizedLinear& linear = other.linears.at("model.layers.1.mlp.up_proj");
  linear.scales = linear.scales.clone();
  linear.scales.view({-1}).narrow(0, 7, 1).fill_(std::numeric_limits<double>::infinity());
  EXPECT_THAT(ExportGptqFolder(*f.base, other, kCard, folder),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("model.layers.1.mlp.up_proj")));
}

TEST(ManifestTest, NamesWhatChanged) {
  const Fixture f = MakeFixture("manifest");
  const std::filesystem::path folder = FreshFolder("manifest");
  ASSERT_THAT(ExportGptqFolder(*f.base, f.quantized, kCard, folder), IsOk());
  EXPECT_THAT(CheckManifest(folder), IsOk());
  const auto manifest = nlohmann::json::parse(ReadFile(folder / "manifest.json").value());
  ASSERT_EQ(manifest.at("files").size(), 7u);
  for (const auto& file : manifest.at("files")) {
    const std::filesystem::path path = folder / file.at("path").get<std::string>();
    EXPECT_EQ(file.at("digest"), DigestOfFile(path).value());
    EXPECT_EQ(file.at("size"), std::filesystem::file_size(path));
  }
  ASSERT_THAT(WriteFileAtomically(folder / "extra.txt", "x"), IsOk());
  EXPECT_THAT(CheckManifest(folder), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("extra.txt")));
  std::filesystem::remove(folder / "extra.txt");
  FlipByte(folder / "tokenizer.json", 2);
  EXPECT_THAT(CheckManifest(folder), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("tokenizer.json")));
  std::filesystem::remove(folder / "tokenizer.json");
  EXPECT_THAT(CheckManifest(folder), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("tokenizer.json")));
}

checkpoint::PeftAdapter TinyAdapter() {
  at::manual_seed(5);
  checkpoint::PeftAdapter adapter{.rank = 4, .lora_alpha = 8, .base_model = "acme/tiny"};
  adapter.pairs["model.layers.0.self_attn.q_proj"] = {at::randn({4, 64}) * 0.1, at::randn({64, 4}) * 0.1};
  adapter.pairs["model.layers.1.mlp.down_proj"] = {at::randn({4, 96}) * 0.1, at::randn({64, 4}) * 0.1};
  return adapter;
}

TEST(AdapterFolderTest, ReadsBackExactly) {
  const std::filesystem::path folder = FreshFolder("adapter");
  const checkpoint::PeftAdapter adapter = TinyAdapter();
  ASSERT_THAT(ExportAdapterFolder(adapter, kCard, folder), IsOk());
  EXPECT_THAT(CheckManifest(folder), IsOk());
  const auto read = checkpoint::LoadPeftAdapter(folder);
  ASSERT_THAT(read, IsOk());
  EXPECT_TRUE(at::equal(read->pairs.at("model.layers.1.mlp.down_proj").b, adapter.pairs.at("model.layers.1.mlp.down_proj").b));
  EXPECT_THAT(ReadFile(folder / "README.md").value(), AllOf(HasSubstr("library_name: peft"), HasSubstr("| rank | 4 |")));
}

// Goal: W + (alpha / r) B A, rounded once.  Method: float64; every merged weight is one of the two nearest bfloat16 values.
TEST(MergedFolderTest, WeightsAreBasePlusAdapterRoundedOnce) {
  const Fixture f = MakeFixture("merged");
  const std::filesystem::path folder = FreshFolder("merged");
  const checkpoint::PeftAdapter adapter = TinyAdapter();
  ASSERT_THAT(ExportMergedFolder(*f.base, adapter, kCard, folder), IsOk());
  EXPECT_THAT(CheckManifest(folder), IsOk());
  const auto merged = checkpoint::ModelFolder::Open(folder).value();
  EXPECT_FALSE(merged->Has("lm_head.weight"));
  EXPECT_EQ(merged->config().at("torch_dtype"), "bfloat16");
  for (const auto& [name, tensor] : f.tensors) {
    const at::Tensor found = merged->Get(name).value();
    EXPECT_EQ(found.scalar_type(), at::kBFloat16);
    const auto pair = adapter.pairs.find(name.substr(0, name.size() - 7));
    if (pair == adapter.pairs.end()) {
      EXPECT_TRUE(at::equal(found, tensor)) << name;
      continue;
    }
    const at::Tensor wanted =
        tensor.to(at::kDouble) + 2.0 * at::mm(pair->second.b.to(at::kDouble), pair->second.a.to(at::kDouble));
    const at::Tensor rounded = wanted.to(at::kBFloat16);
    EXPECT_GT(found.eq(rounded).to(at::kDouble).mean().item<double>(), 0.999) << name;
    EXPECT_LE(((found.to(at::kDouble) - wanted).abs() / wanted.abs()).max().item<double>(), 1.001 / 256) << name;
    EXPECT_FALSE(at::equal(found, tensor)) << name;
  }
  checkpoint::PeftAdapter foreign = adapter;
  foreign.pairs["model.layers.9.mlp.down_proj"] = foreign.pairs.begin()->second;
  EXPECT_THAT(ExportMergedFolder(*f.base, foreign, kCard, FreshFolder("foreign")),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("model.layers.9.mlp.down_proj")));
}

}  // namespace
}  // namespace refinery::exporting
