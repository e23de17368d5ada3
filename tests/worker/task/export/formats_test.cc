#include "worker/task/runtime/torch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "absl/strings/escaping.h"
#include "common/files.h"
#include "tests/support/status_matchers.h"
#include "tests/worker/task/quantize/tiny_model.h"
#include "worker/task/checkpoint/gguf.h"
#include "worker/task/checkpoint/gguf_writer.h"
#include "worker/task/checkpoint/safetensors.h"
#include "worker/task/export/export.h"
#include "worker/task/export/gguf_blocks.h"
#include "worker/task/export/gguf_vocabulary.h"
#include "worker/task/export/parts.h"
#include "worker/task/export/stored_size.h"
#include "worker/task/quantize/quantized_artifact.h"

namespace refinery::exporting {
namespace {

using ::refinery::testing::IsOk;
using ::refinery::testing::StatusIs;
using ::refinery::testing::TinyConfig;
using ::refinery::testing::TinyModel;
using ::refinery::testing::TinyTensors;
using ::testing::HasSubstr;
using ::testing::StartsWith;
using quantize::QuantizedLinear;

constexpr char kVectors[] = REFINERY_SOURCE_DIR "/tests/vectors/export/";
constexpr char kK[] = "model.layers.0.self_attn.k_proj";

nlohmann::json Vectors(const std::string& name) { return nlohmann::json::parse(ReadFile(kVectors + name).value()); }

at::Tensor Decode(const nlohmann::json& base64, at::ScalarType dtype, at::IntArrayRef shape) {
  std::string bytes;
  EXPECT_TRUE(absl::Base64Unescape(base64.get<std::string>(), &bytes));
  at::Tensor tensor = at::empty(shape, dtype);
  EXPECT_EQ(tensor.nbytes(), bytes.size());
  std::memcpy(tensor.data_ptr(), bytes.data(), std::min(bytes.size(), tensor.nbytes()));
  return tensor;
}

std::filesystem::path FreshFolder(const std::string& name) {
  const std::filesystem::path folder = std::filesystem::path(::testing::TempDir()) / ("formats_test_" + name);
  std::filesystem::remove_all(folder);
  std::filesystem::create_directories(folder);
  return folder;
}

// Goal: the container is what llama.cpp's own library writes.  Method: every byte of a file that gguf-py wrote.
TEST(GgufWriterTest, WritesThePeersBytes) {
  checkpoint::GgufNewMetadata metadata;
  metadata.emplace_back("general.architecture", std::string("llama"));
  metadata.emplace_back("a.u32", uint32_t{4000000000});
  metadata.emplace_back("a.i32", int32_t{-7});
  metadata.emplace_back("a.u64", uint64_t{1} << 40);
  metadata.emplace_back("a.f32", 1e-5f);
  metadata.emplace_back("a.bool", true);
  metadata.emplace_back("a.text", std::string("na\u00efve \n"));
  metadata.emplace_back("a.ints", std::vector<int32_t>{1, -2, 3});
  metadata.emplace_back("a.floats", std::vector<float>{0.5f, -1e9f});
  metadata.emplace_back("a.texts", std::vector<std::string>{"", "\u0120the", "x y"});
  const std::vector<checkpoint::GgufNewTensor> tensors = {
      {"norm", checkpoint::kGgufF32, {5}},      {"half", checkpoint::kGgufF16, {3, 4}},   {"brain", checkpoint::kGgufBf16, {2, 8}},
      {"q4_0", checkpoint::kGgufQ4_0, {3, 64}}, {"q4_1", checkpoint::kGgufQ4_1, {1, 32}}, {"q8_0", checkpoint::kGgufQ8_0, {2, 32}}};
  const std::filesystem::path path = FreshFolder("writer") / "ours.gguf";
  auto writer = checkpoint::GgufWriter::Create(path, metadata, tensors).value();
  for (const checkpoint::GgufNewTensor& tensor : tensors) {
    std::string bytes(tensor.bytes(), '\0');
    for (size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(i % 251);
    ASSERT_THAT(writer->Append(bytes), IsOk());
  }
  ASSERT_THAT(writer->Finish(), IsOk());
  EXPECT_EQ(ReadFile(path).value(), ReadFile(std::string(kVectors) + "peer.gguf").value());
}

TEST(GgufWriterTest, RefusesWhatDoesNotFit) {
  const std::filesystem::path folder = FreshFolder("refuses");
  EXPECT_THAT(checkpoint::GgufWriter::Create(folder / "a.gguf", {}, {{"odd", checkpoint::kGgufQ4_0, {2, 40}}}).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("odd")));
  auto writer = checkpoint::GgufWriter::Create(folder / "b.gguf", {}, {{"norm", checkpoint::kGgufF32, {5}}}).value();
  EXPECT_THAT(writer->Append("short"), StatusIs(absl::StatusCode::kInternal, HasSubstr("norm")));
  EXPECT_THAT(writer->Finish(), StatusIs(absl::StatusCode::kInternal, HasSubstr("missing")));
  writer.reset();
  EXPECT_TRUE(std::filesystem::is_empty(folder));
}

class GgufBlocksTest : public ::testing::TestWithParam<const char*> {};

// Goal: codes and scales become the blocks that stand for them.  Method: blocks that gguf-py's quantizer made of their weights.
TEST_P(GgufBlocksTest, AreThoseOfThePeer) {
  const nlohmann::json v = Vectors("blocks.json")[GetParam()];
  const int64_t out = v["out"], in = v["in"], groups = in / v["group_size"].get<int64_t>();
  QuantizedLinear linear{.codes = Decode(v["codes"], at::kByte, {out, in}), .scales = Decode(v["scales"], at::kHalf, {out, groups}),
                         .bits = v["bits"], .group_size = v["group_size"]};
  if (v["zeros"] != "") linear.zeros = Decode(v["zeros"], at::kByte, {out, groups});
  const at::Tensor rows = EncodeBlocks(linear);
  ASSERT_TRUE(at::equal(rows, Decode(v["blocks"], at::kByte, rows.sizes())));
  const BlockCodes read = DecodeBlocks(rows, BlockType(linear));
  EXPECT_TRUE(at::equal(read.codes, linear.codes));
  EXPECT_TRUE(at::equal(read.scales, linear.scales.repeat_interleave(linear.group_size / 32, 1)));
}

INSTANTIATE_TEST_SUITE_P(AllTypes, GgufBlocksTest, ::testing::Values("Q4_0", "Q4_1", "Q8_0"),
                         [](const auto& info) { return std::string(info.param); });

TEST(GgufBlocksTest, RoundingToQ8IsThePeers) {
  const nlohmann::json v = Vectors("blocks.json")["rounded"];
  const at::Tensor rows = RoundToQ8_0(Decode(v["weights"], at::kFloat, {4, 96}));
  EXPECT_TRUE(at::equal(rows, Decode(v["blocks"], at::kByte, {4, 3 * 34})));
}

// Row 2j of a head is old row j, row 2j + 1 old row j + half.
TEST(GgufBlocksTest, InterleavesTheRowsOfEachHead) {
  EXPECT_TRUE(at::equal(InterleavedOrder(12, 2), at::tensor({0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11}, at::kLong)));
}

// A byte-level tokenizer of 80 tokens, split as SmolLM's.
void WriteTokenizer(const std::filesystem::path& folder) {
  nlohmann::json vocab;
  for (int i = 0; i < 70; ++i) vocab["t" + std::to_string(i)] = i + 3;
  const nlohmann::json tokenizer = {
      {"added_tokens", {{{"id", 0}, {"content", "<unk>"}, {"special", true}}, {{"id", 1}, {"content", "<s>"}, {"special", true}},
                        {{"id", 2}, {"content", "</s>"}, {"special", true}}, {{"id", 73}, {"content", "<tool>"}, {"special", false}}}},
      {"pre_tokenizer",
       {{"type", "Sequence"},
        {"pretokenizers",
         {{{"type", "Digits"}, {"individual_digits", true}},
          {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", false}, {"use_regex", true}}}}}},
      {"post_processor",
       {{"type", "TemplateProcessing"}, {"single", {{{"SpecialToken", {{"id", "<s>"}, {"type_id", 0}}}}, {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}}}}},
      {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", {"t1 t2", {"t3", "t4"}}}}}};
  EXPECT_THAT(WriteFileAtomically(folder / "tokenizer.json", tokenizer.dump()), IsOk());
  EXPECT_THAT(WriteFileAtomically(folder / "tokenizer_config.json",
                                  R"({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "{{ messages }}"})"),
              IsOk());
  EXPECT_THAT(WriteFileAtomically(folder / "generation_config.json", R"({"eos_token_id": [2, 73]})"), IsOk());
}

struct Fixture {
  std::filesystem::path path;
  std::shared_ptr<checkpoint::ModelFolder> base;
  quantize::QuantizedModel quantized;
};

Fixture MakeFixture(const std::string& name, quantize::GptqSettings settings) {
  Fixture f{.path = FreshFolder(name + "_base")};
  const auto tensors = TinyTensors(at::kBFloat16);
  EXPECT_THAT(checkpoint::WriteSafetensors(f.path / "model.safetensors", tensors), IsOk());
  EXPECT_THAT(WriteFileAtomically(f.path / "config.json", TinyConfig().dump()), IsOk());
  WriteTokenizer(f.path);
  f.base = checkpoint::ModelFolder::Open(f.path).value();
  f.quantized = quantize::RoundModelToNearest(*TinyModel(tensors, at::kBFloat16), settings);
  return f;
}

// The layer of packed.json in the place of a layer of the same size.
QuantizedLinear PackedLayer(const nlohmann::json& v, int64_t bits, bool zeros) {
  QuantizedLinear linear{.codes = Decode(v["codes"], at::kByte, {32, 64}), .scales = Decode(v["scales"], at::kHalf, {32, 2}),
                         .bits = bits, .group_size = 32};
  if (zeros) linear.zeros = Decode(v["zeros"], at::kByte, {32, 2});
  return linear;
}

// Goal: words as compressed-tensors packs them, with and without zero points.  Method: its pack_to_int32.
TEST(CompressedTensorsTest, WordsAreThoseOfThePeer) {
  for (const int64_t bits : {4, 8}) {
    for (const bool zeros : {false, true}) {
      Fixture f = MakeFixture("words", {.bits = bits, .group_size = 32, .grid = zeros ? quantize::Grid::kAsymmetric : quantize::Grid::kFullRange});
      const nlohmann::json v = Vectors("packed.json")[std::to_string(bits)];
      f.quantized.linears[kK] = PackedLayer(v, bits, zeros);
      const std::filesystem::path folder = FreshFolder("words");
      ASSERT_THAT(ExportCompressedTensorsFolder(*f.base, f.quantized, {.name = "tiny"}, folder), IsOk());
      const auto file = checkpoint::SafetensorsFile::Open(folder / "model.safetensors").value();
      const std::string k = kK;
      EXPECT_TRUE(at::equal(file->Get(k + ".weight_packed").value(), Decode(v["weight_packed"], at::kInt, {32, 2 * bits})));
      EXPECT_TRUE(at::equal(file->Get(k + ".weight_scale").value(), Decode(v["scales"], at::kHalf, {32, 2})));
      EXPECT_TRUE(at::equal(file->Get(k + ".weight_shape").value(), at::tensor({32, 64}, at::kLong)));
      EXPECT_EQ(file->tensors().contains(k + ".weight_zero_point"), zeros);
      if (zeros) {
        EXPECT_TRUE(at::equal(file->Get(k + ".weight_zero_point").value(), Decode(v["weight_zero_point"], at::kInt, {bits, 2})));
      }
      EXPECT_FALSE(file->tensors().contains(k + ".weight"));
    }
  }
}

TEST(CompressedTensorsTest, ConfigSaysWhatTheLayersAre) {
  Fixture f = MakeFixture("config", {.bits = 4, .group_size = 32});
  const std::filesystem::path folder = FreshFolder("config");
  ASSERT_THAT(ExportCompressedTensorsFolder(*f.base, f.quantized, {.name = "tiny"}, folder), IsOk());
  nlohmann::json q = nlohmann::json::parse(ReadFile(folder / "config.json").value())["quantization_config"];
  EXPECT_EQ(q["format"], "pack-quantized");
  EXPECT_EQ(q["ignore"], nlohmann::json::array({"lm_head"}));
  EXPECT_EQ(q["config_groups"].size(), 1u);
  EXPECT_EQ(q["config_groups"]["group_0"]["targets"], nlohmann::json::array({"Linear"}));
  EXPECT_EQ(q["config_groups"]["group_0"]["weights"]["group_size"], 32);
  // A layer of 3 bits stands as one of 4; another width is a group of its own.
  const at::Tensor weight = TinyTensors(at::kBFloat16).at(std::string(kK) + ".weight");
  const QuantizedLinear three = quantize::RoundToNearest(weight, {.bits = 3, .group_size = 32});
  f.quantized.linears[kK] = three;
  f.quantized.linears["model.layers.1.self_attn.k_proj"] = quantize::RoundToNearest(weight, {.bits = 8, .group_size = 32});
  ASSERT_THAT(ExportCompressedTensorsFolder(*f.base, f.quantized, {.name = "tiny"}, folder), IsOk());
  q = nlohmann::json::parse(ReadFile(folder / "config.json").value())["quantization_config"];
  ASSERT_EQ(q["config_groups"].size(), 2u);
  const auto file = checkpoint::SafetensorsFile::Open(folder / "model.safetensors").value();
  const at::Tensor words = file->Get(std::string(kK) + ".weight_packed").value();
  EXPECT_EQ(words.size(1), 8);
  EXPECT_EQ(words[0][0].item<int>() & 15, three.codes[0][0].item<int>() + 4);
}

// Goal: every weight reads back as the codes say, Q and K put back.  Method: our reader of GGUF, which is bit-equal to gguf-py's.
TEST(GgufFolderTest, DequantizesToTheSameWeights) {
  for (const int64_t bits : {4, 8}) {
    const Fixture f = MakeFixture("gguf", {.bits = bits, .group_size = 32});
    const std::filesystem::path folder = FreshFolder("gguf");
    ASSERT_THAT(ExportGgufFolder(*f.base, f.quantized, {.name = "tiny"}, {}, folder), IsOk());
    EXPECT_THAT(CheckManifest(folder), IsOk());
    const auto file = checkpoint::GgufFile::Open(folder / "model.gguf").value();
    EXPECT_EQ(file->Int("general.file_type"), bits == 4 ? 2 : 7);
    const at::Tensor k = file->Dequantize("blk.0.attn_k.weight").value();  // 2 heads of 16
    EXPECT_TRUE(at::equal(k.view({2, 8, 2, 64}).transpose(1, 2).reshape({32, 64}), f.quantized.linears.at(kK).Dequantize()));
    EXPECT_TRUE(at::equal(file->Dequantize("blk.1.ffn_down.weight").value(),
                          f.quantized.linears.at("model.layers.1.mlp.down_proj").Dequantize()));
    EXPECT_TRUE(at::equal(file->Dequantize("token_embd.weight").value(), f.base->Get("model.embed_tokens.weight").value().to(at::kFloat)));
    EXPECT_EQ(file->Find("output.weight"), nullptr);
    const ModelBytes bytes = BytesOf(folder).value();
    EXPECT_DOUBLE_EQ(bytes.linear_ratio(), bits == 4 ? 4.5 / 16 : 8.5 / 16);
    EXPECT_EQ(bytes.model - bytes.without_embeddings, 80u * 64 * 2);
  }
}

// Goal: what has no blocks stands as its weights; few bits stand as 4.  Method: the definition scale * (code - zero), rounded once.
TEST(GgufFolderTest, WhatHasNoBlocksStandsAsWeights) {
  struct Case {
    const char* name;
    quantize::GptqSettings settings;
    int64_t file_type;
  };
  for (const Case& c : {Case{"small groups", {.bits = 4, .group_size = 16}, 1},
                        Case{"zero points with 8 bits", {.bits = 8, .group_size = 32, .grid = quantize::Grid::kAsymmetric}, 1},
                        Case{"3 bits", {.bits = 3, .group_size = 32}, 2},
                        Case{"2 bits with zero points", {.bits = 2, .group_size = 32, .grid = quantize::Grid::kAsymmetric}, 3}}) {
    SCOPED_TRACE(c.name);
    const Fixture f = MakeFixture("plain", c.settings);
    const std::filesystem::path folder = FreshFolder("plain");
    ASSERT_THAT(ExportGgufFolder(*f.base, f.quantized, {.name = "tiny"}, {}, folder), IsOk());
    const auto file = checkpoint::GgufFile::Open(folder / "model.gguf").value();
    EXPECT_EQ(file->Int("general.file_type"), c.file_type);
    at::Tensor wanted = f.quantized.linears.at(kK).Dequantize(), k = file->Dequantize("blk.0.attn_k.weight").value();
    k = k.view({2, 8, 2, 64}).transpose(1, 2).reshape({32, 64});
    if (c.file_type == 1) wanted = wanted.to(at::kHalf).to(at::kFloat);
    if (c.file_type == 3) {
      EXPECT_TRUE(at::allclose(k, wanted, 0, wanted.abs().max().item<double>() * 1e-3));  // Q4_1's minimum is rounded
    } else {
      EXPECT_TRUE(at::equal(k, wanted));
    }
  }
  // A permuted g_idx, and scales beyond float16's range of weights.
  Fixture f = MakeFixture("plain", {.bits = 4, .group_size = 32});
  QuantizedLinear& down = f.quantized.linears.at("model.layers.1.mlp.down_proj");
  down.group_index = at::arange(96, at::kInt).remainder(3).to(at::kInt);
  f.quantized.linears.at(kK).scales.fill_(60000);
  f.quantized.linears.at(kK).group_index = at::arange(64, at::kInt).remainder(2).to(at::kInt);
  const std::filesystem::path folder = FreshFolder("plain");
  ASSERT_THAT(ExportGgufFolder(*f.base, f.quantized, {.name = "tiny"}, {}, folder), IsOk());
  const auto file = checkpoint::GgufFile::Open(folder / "model.gguf").value();
  EXPECT_TRUE(at::equal(file->Dequantize("blk.1.ffn_down.weight").value(), down.Dequantize().to(at::kHalf).to(at::kFloat)));
  EXPECT_EQ(file->Find("blk.1.ffn_down.weight")->type->id, checkpoint::kGgufF16);
  EXPECT_EQ(file->Find("blk.0.attn_k.weight")->type->id, checkpoint::kGgufBf16);
  EXPECT_EQ(file->Find("blk.1.attn_k.weight")->type->id, checkpoint::kGgufQ4_0);
}

// Goal: llama.cpp finds the tokens, their kinds and the template.  Method: the expected values, written out.
TEST(GgufFolderTest, HoldsTheTokenizer) {
  const std::filesystem::path folder = FreshFolder("vocabulary");
  WriteTokenizer(folder);
  const auto metadata = GgufVocabulary(folder, 80);
  ASSERT_THAT(metadata, IsOk());
  const std::map<std::string, checkpoint::GgufNewValue> found(metadata->begin(), metadata->end());
  EXPECT_EQ(std::get<std::string>(found.at("tokenizer.ggml.pre")), "smollm");
  EXPECT_EQ(std::get<std::string>(found.at("tokenizer.chat_template")), "{{ messages }}");
  EXPECT_EQ(std::get<bool>(found.at("tokenizer.ggml.add_bos_token")), true);
  EXPECT_EQ(std::get<bool>(found.at("tokenizer.ggml.add_eos_token")), false);
  EXPECT_EQ(std::get<uint32_t>(found.at("tokenizer.ggml.bos_token_id")), 1u);
  EXPECT_EQ(std::get<uint32_t>(found.at("tokenizer.ggml.eos_token_id")), 2u);
  EXPECT_EQ(std::get<uint32_t>(found.at("tokenizer.ggml.eot_token_id")), 73u);
  const auto& tokens = std::get<std::vector<std::string>>(found.at("tokenizer.ggml.tokens"));
  const auto& types = std::get<std::vector<int32_t>>(found.at("tokenizer.ggml.token_type"));
  EXPECT_EQ(tokens[3], "t0");
  EXPECT_EQ(tokens[79], "[PAD79]");
  EXPECT_EQ((std::vector<int32_t>{types[1], types[3], types[73], types[79]}), (std::vector<int32_t>{3, 1, 4, 5}));
  EXPECT_EQ(std::get<std::vector<std::string>>(found.at("tokenizer.ggml.merges")), (std::vector<std::string>{"t1 t2", "t3 t4"}));
  EXPECT_THAT(GgufVocabulary(folder, 60).status(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("embeddings")));
}

TEST(GgufFolderTest, LeavesNothingBehindWhenItRefuses) {
  Fixture f = MakeFixture("refused", {.bits = 4, .group_size = 32});
  f.quantized.linears.erase("model.layers.1.mlp.down_proj");
  const std::filesystem::path folder = FreshFolder("refused") / "gguf";
  EXPECT_THAT(ExportGgufFolder(*f.base, f.quantized, {}, {}, folder),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("modules")));
  EXPECT_FALSE(std::filesystem::exists(folder));
}

// Goal: seeds and digests travel with every format.  Method: read back as the format's own readers would.
TEST(FormatsTest, EveryFormatSaysHowItCameAbout) {
  Fixture f = MakeFixture("provenance", {.bits = 4, .group_size = 32});
  f.quantized.calibration_digest = "c0ffee";
  f.quantized.calibration_tokens = 512;
  f.quantized.calibration_facts = {{"seed", 5}, {"general_share", 0.25}};
  f.quantized.recovery = {{"seed", 9}, {"train_digest", "ab"}};
  const std::filesystem::path folder = FreshFolder("provenance");
  const auto json_of = [](const std::filesystem::path& path) { return nlohmann::json::parse(ReadFile(path).value()); };
  ASSERT_THAT(ExportGptqFolder(*f.base, f.quantized, {.name = "tiny"}, folder / "gptq"), IsOk());
  ASSERT_THAT(ExportCompressedTensorsFolder(*f.base, f.quantized, {.name = "tiny"}, folder / "ct"), IsOk());
  ASSERT_THAT(ExportGgufFolder(*f.base, f.quantized, {.name = "tiny"}, {}, folder / "gguf"), IsOk());
  const auto gguf = checkpoint::GgufFile::Open(folder / "gguf" / "model.gguf").value();
  for (const nlohmann::json& said :
       {json_of(folder / "gptq" / "config.json")["quantization_config"]["meta"], json_of(folder / "ct" / "config.json")["refinery"],
        nlohmann::json::parse(gguf->String("refinery.provenance").value_or("{}"))}) {
    EXPECT_EQ(said["calibration_digest"], "c0ffee");
    EXPECT_EQ(said["settings"]["grid"], "full_range");
    EXPECT_EQ(said["calibration_tokens"], 512);
    EXPECT_EQ(said["calibration"], f.quantized.calibration_facts);
    EXPECT_EQ(said["recovery"], f.quantized.recovery);
    EXPECT_THAT(said["quantizer"][0].get<std::string>(), StartsWith("refinery:"));
  }
}

// Goal: a size budget counts what the folders really take.  Method: the tensors of folders that were written; GPTQ's g_idx,
// which packed codes do not need, aside.
TEST(StoredSizeTest, IsThatOfTheTensorsOfTheFolder) {
  for (const quantize::GptqSettings& settings :
       {quantize::GptqSettings{.bits = 4, .group_size = 32}, {.bits = 8, .group_size = 32}, {.bits = 3, .group_size = 32}, {.bits = 4, .group_size = 16},
        {.bits = 4, .group_size = -1}, {.bits = 4, .group_size = 1000},
        {.bits = 4, .group_size = 32, .grid = quantize::Grid::kAsymmetric}, {.bits = 8, .group_size = 32, .grid = quantize::Grid::kAsymmetric}}) {
    SCOPED_TRACE(quantize::SettingsToJson(settings).dump());
    Fixture f = MakeFixture("stored", settings);
    // compressed-tensors holds 3 bits, as 4, in single layers only.
    const at::Tensor weight = TinyTensors(at::kBFloat16).at("model.layers.1.mlp.down_proj.weight");
    if (settings.bits == 3) f.quantized.linears["model.layers.1.mlp.down_proj"] = quantize::RoundToNearest(weight, {.bits = 4, .group_size = 32});
    const std::filesystem::path folder = FreshFolder("stored");
    const QuantSettings as = SettingsOf(f.quantized);
    const auto sum = [&](Format format) {
      int64_t bytes = 0;
      for (const auto& [module, linear] : f.quantized.linears)
        bytes += LargestStoredBytes({format}, as, linear.codes.size(0), linear.codes.size(1), linear.bits);
      return bytes;
    };
    ASSERT_THAT(ExportGgufFolder(*f.base, f.quantized, {}, {}, folder / "gguf"), IsOk());
    EXPECT_EQ(sum(Format::kGguf), static_cast<int64_t>(BytesOf(folder / "gguf")->linear));
    ASSERT_THAT(ExportGptqFolder(*f.base, f.quantized, {}, folder / "gptq"), IsOk());
    const auto file = checkpoint::SafetensorsFile::Open(folder / "gptq" / "model.safetensors").value();
    int64_t stored = 0;
    for (const auto& [module, linear] : f.quantized.linears)
      for (const char* part : {".qweight", ".qzeros", ".scales"}) stored += static_cast<int64_t>(file->Get(module + part)->nbytes());
    EXPECT_EQ(sum(Format::kGptq), stored);
    if (settings.group_size == 1000) continue;  // which only GPTQ's and GGUF's readers take
    ASSERT_THAT(ExportCompressedTensorsFolder(*f.base, f.quantized, {}, folder / "ct"), IsOk());
    EXPECT_EQ(sum(Format::kCompressedTensors), static_cast<int64_t>(BytesOf(folder / "ct")->linear));
  }
}

// Goal: layers of another width load.  Method: the folder opens, and every weight is what its codes say.
TEST(GptqFolderTest, LayersOfOtherWidthsStandInDynamic) {
  Fixture f = MakeFixture("dynamic", {.bits = 4, .group_size = 32});
  const at::Tensor weight = TinyTensors(at::kBFloat16).at("model.layers.1.mlp.down_proj.weight");
  f.quantized.linears["model.layers.1.mlp.down_proj"] = quantize::RoundToNearest(weight, {.bits = 8, .group_size = 32});
  for (const Format format : {Format::kGptq, Format::kGptqV2}) {
    const std::filesystem::path folder = FreshFolder("dynamic");
    ASSERT_THAT(ExportGptqFolder(*f.base, f.quantized, {}, folder, format), IsOk());
    const nlohmann::json q = nlohmann::json::parse(ReadFile(folder / "quantize_config.json").value());
    EXPECT_EQ(q["dynamic"], nlohmann::json({{"+:model\\.layers\\.(?:1)\\.mlp\\.down_proj$", {{"bits", 8}, {"group_size", 32}}}}));
    const auto opened = checkpoint::ModelFolder::Open(folder).value();
    for (const auto& [module, linear] : f.quantized.linears)
      EXPECT_TRUE(at::equal(opened->Get(module + ".weight").value(), linear.Dequantize())) << module;
  }
}

}  // namespace
}  // namespace refinery::exporting
