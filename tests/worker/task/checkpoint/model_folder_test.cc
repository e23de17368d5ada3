// Model folders: single and sharded weights, GPTQ checkpoints of every width, real files.
#include "worker/task/runtime/torch.h"
//
#include "worker/task/checkpoint/model_folder.h"

#include "tests/support/status_matchers.h"
#include "tests/worker/task/checkpoint/folder_fixture.h"

namespace refinery::checkpoint {
namespace {

using ::refinery::testing::IsOk;
using ::refinery::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using nlohmann::json;

class ModelFolderTest : public FolderTest {};

// Packs `values` the way the GPTQ format is specified: 2, 4 and 8 bits as whole fields of a word from the least
// significant; 3 bits as 32 values in three words with v10 and v21 across the borders.
std::vector<uint32_t> Pack(const std::vector<uint32_t>& values, int64_t bits) {
  std::vector<uint32_t> words;
  if (bits != 3) {
    size_t per_word = 32 / static_cast<size_t>(bits);
    for (size_t i = 0; i < values.size(); i += per_word) {
      uint32_t word = 0;
      for (size_t j = 0; j < per_word; ++j) word |= values[i + j] << (static_cast<size_t>(bits) * j);
      words.push_back(word);
    }
    return words;
  }
  for (size_t i = 0; i < values.size(); i += 32) {
    const uint32_t* v = &values[i];
    uint32_t w0 = (v[10] & 3) << 30, w1 = v[10] >> 2 | (v[21] & 1) << 31, w2 = v[21] >> 1;
    for (int j = 0; j < 10; ++j) {
      w0 |= v[j] << (3 * j);
      w1 |= v[11 + j] << (1 + 3 * j);
      w2 |= v[22 + j] << (2 + 3 * j);
    }
    words.insert(words.end(), {w0, w1, w2});
  }
  return words;
}

struct Example {
  at::Tensor qweight, qzeros, scales, g_idx, expected;
};

// Random codes, zero points and scales; `expected` is the definition scale * (code - zero), element by element.
Example MakeExample(int64_t bits, bool v1, bool shuffled_groups) {
  constexpr int64_t kIn = 64, kOut = 32, kGroup = 32, kGroups = 2;
  at::manual_seed(static_cast<uint64_t>(bits));
  const int64_t levels = int64_t{1} << bits;
  at::Tensor codes = at::randint(levels, {kOut, kIn}), zeros = at::randint(1, levels, {kGroups, kOut});
  Example e;
  e.scales = at::randn({kGroups, kOut}).to(at::kHalf);
  e.g_idx = at::arange(kIn, at::kInt).floor_divide(kGroup).to(at::kInt);
  if (shuffled_groups) e.g_idx = e.g_idx.flip(0).contiguous();
  at::Tensor scales = e.scales.to(at::kFloat);
  e.expected = at::empty({kOut, kIn});
  for (int64_t o = 0; o < kOut; ++o)
    for (int64_t i = 0; i < kIn; ++i) {
      int64_t g = e.g_idx[i].item<int64_t>();
      e.expected[o][i] = scales[g][o].item<float>() * (codes[o][i].item<float>() - zeros[g][o].item<float>());
    }
  auto words = [&](const at::Tensor& values) {
    std::vector<uint32_t> list;
    for (int64_t k = 0; k < values.numel(); ++k) list.push_back(static_cast<uint32_t>(values[k].item<int64_t>()));
    std::vector<uint32_t> packed = Pack(list, bits);
    return at::from_blob(packed.data(), {static_cast<int64_t>(packed.size())}, at::kInt).clone();
  };
  std::vector<at::Tensor> columns, rows;
  for (int64_t o = 0; o < kOut; ++o) columns.push_back(words(codes[o]));
  for (int64_t g = 0; g < kGroups; ++g) rows.push_back(words(zeros[g] - (v1 ? 1 : 0)));
  e.qweight = at::stack(columns, 1).contiguous();
  e.qzeros = at::stack(rows, 0).contiguous();
  return e;
}

TEST_F(ModelFolderTest, GptqCheckpointsOfEveryWidthDequantize) {
  for (int64_t bits : {2, 3, 4, 8})
    for (bool v1 : {true, false})
      for (bool shuffled : {false, true}) {
        SCOPED_TRACE(Join(bits, " bits, v1 ", v1, ", shuffled ", shuffled));
        Example e = MakeExample(bits, v1, shuffled);
        const std::string p = "model.layers.0.mlp.up_proj";
        std::filesystem::create_directories(folder_);
        ASSERT_THAT(WriteSafetensors(folder_ / "model.safetensors", {{p + ".qweight", e.qweight},
                                                                     {p + ".qzeros", e.qzeros},
                                                                     {p + ".scales", e.scales},
                                                                     {p + ".g_idx", e.g_idx},
                                                                     {"model.norm.weight", at::ones({4})}}),
                    IsOk());
        Write("config.json", json{{"quantization_config",
                                   {{"quant_method", "gptq"}, {"checkpoint_format", v1 ? "gptq" : "gptq_v2"},
                                    {"bits", bits}, {"group_size", 32}}}}
                                 .dump());
        auto folder = ModelFolder::Open(folder_);
        ASSERT_THAT(folder, IsOk());
        EXPECT_THAT((*folder)->Names(), ElementsAre(p + ".weight", "model.norm.weight"));
        EXPECT_TRUE((*folder)->Has(p + ".weight"));
        EXPECT_FALSE((*folder)->Has(p + ".bias"));
        auto weight = (*folder)->Get(p + ".weight");
        ASSERT_THAT(weight, IsOk());
        EXPECT_TRUE(at::equal(*weight, e.expected));
        EXPECT_EQ((*folder)->ParameterCount(), 64u * 32u + 4u);
      }
}

// Bytes of base64 text as a tensor of that dtype and shape.
at::Tensor Decoded(const json& entry, at::ScalarType dtype) {
  const std::string kAlphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string bytes;
  uint32_t bits = 0;
  int count = 0;
  for (char c : entry.at("data").get<std::string>()) {
    const size_t value = kAlphabet.find(c);
    if (value == std::string::npos) break;
    bits = bits << 6 | static_cast<uint32_t>(value);
    count += 6;
    if (count >= 8) bytes += static_cast<char>(bits >> (count -= 8) & 0xFF);
  }
  return at::from_blob(bytes.data(), entry.at("shape").get<std::vector<int64_t>>(), dtype).clone();
}

// Goal: checkpoints as gptqmodel packs them, v1 and v2, inputs in order and by activation.  Oracle: its own weights, which it
// rounds to float16 once (tests/vectors/gptq/make_vectors.py).
TEST_F(ModelFolderTest, GptqWeightsEqualGptqmodels) {
  const json vectors =
      json::parse(*ReadFile(std::filesystem::path(REFINERY_SOURCE_DIR) / "tests/vectors/gptq/dequantized.json"));
  ASSERT_EQ(vectors["layers"].size(), 8u);
  for (const json& layer : vectors["layers"]) {
    SCOPED_TRACE(Join(layer["bits"].get<int>(), " bits, ", layer["checkpoint_format"].get<std::string>()));
    GptqTensors tensors{.qweight = Decoded(layer["qweight"], at::kInt), .qzeros = Decoded(layer["qzeros"], at::kInt),
                        .scales = Decoded(layer["scales"], at::kHalf), .g_idx = Decoded(layer["g_idx"], at::kInt)};
    auto weight = DequantizeGptq(tensors, {.bits = layer["bits"], .group_size = layer["group_size"],
                                           .zeros_minus_one = layer["checkpoint_format"] == "gptq"});
    ASSERT_THAT(weight, IsOk());
    EXPECT_TRUE(at::equal(weight->to(at::kHalf), Decoded(layer["weight"], at::kHalf)));
  }
}

TEST_F(ModelFolderTest, ContradictoryGptqTensorsAreRefused) {
  auto status = [](const std::function<void(Example&)>& change) {
    Example e = MakeExample(4, true, false);
    change(e);
    return DequantizeGptq({e.qweight, e.qzeros, e.scales, e.g_idx}, {.bits = 4, .group_size = 32}).status();
  };
  EXPECT_THAT(status([](Example&) {}), IsOk());
  auto lost = [&](const std::function<void(Example&)>& change, const char* reason) {
    EXPECT_THAT(status(change), StatusIs(absl::StatusCode::kDataLoss, HasSubstr(reason)));
  };
  lost([](Example& e) { e.g_idx = e.g_idx + 1; }, "g_idx[32] is 2");
  lost([](Example& e) { e.g_idx = e.g_idx - 1; }, "g_idx[0] is -1");
  lost([](Example& e) { e.scales = e.scales.slice(1, 0, 31); }, "contradict");
  lost([](Example& e) { e.scales = e.scales.slice(0, 0, 1); }, "contradict");
  lost([](Example& e) { e.qzeros = e.qzeros.slice(1, 0, 3); }, "contradict");
  lost([](Example& e) { e.qweight = e.qweight.to(at::kLong); }, "int32");
  lost([](Example& e) { e.qweight = e.qweight.slice(0, 0, 2); }, "do not fit");
}

TEST_F(ModelFolderTest, ShardsAreFoundThroughTheIndex) {
  Write("config.json", "{}");
  ASSERT_THAT(WriteSafetensors(folder_ / "model-00001-of-00002.safetensors", {{"a", at::ones({2})}}), IsOk());
  ASSERT_THAT(WriteSafetensors(folder_ / "model-00002-of-00002.safetensors", {{"b", at::zeros({3})}}), IsOk());
  json map = {{"a", "model-00001-of-00002.safetensors"}, {"b", "model-00002-of-00002.safetensors"}};
  auto open = [&] {
    Write("model.safetensors.index.json", json{{"weight_map", map}}.dump());
    return ModelFolder::Open(folder_);
  };
  auto folder = open();
  ASSERT_THAT(folder, IsOk());
  EXPECT_THAT((*folder)->Names(), ElementsAre("a", "b"));
  EXPECT_EQ((*folder)->Get("b")->numel(), 3);
  EXPECT_EQ((*folder)->ParameterCount(), 5u);
  EXPECT_THAT((*folder)->Get("c"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("no tensor c")));
  map["c"] = "model-00002-of-00002.safetensors";
  EXPECT_THAT(open(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("does not hold c")));
  map["c"] = "../secret.safetensors";
  EXPECT_THAT(open(), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("not a file name")));
  map["c"] = "model-00003-of-00002.safetensors";
  EXPECT_THAT(open(), StatusIs(absl::StatusCode::kNotFound, HasSubstr("model-00003")));
}

TEST_F(ModelFolderTest, WrongFoldersGiveASentenceThatNamesTheFile) {
  EXPECT_THAT(ModelFolder::Open(folder_ / "none"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("none")));
  EXPECT_THAT(ModelFolder::Open(folder_), StatusIs(absl::StatusCode::kNotFound, HasSubstr("config.json")));
  Write("config.json", "{");
  EXPECT_THAT(ModelFolder::Open(folder_), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("config.json")));
  Write("config.json", "{}");
  EXPECT_THAT(ModelFolder::Open(folder_), StatusIs(absl::StatusCode::kNotFound, HasSubstr("safetensors")));
  ASSERT_THAT(WriteSafetensors(folder_ / "model.safetensors", {{"a", at::ones({2})}}), IsOk());
  for (const char* config : {R"({"quant_method":"awq","bits":4,"group_size":32})",
                             R"({"quant_method":"gptq","bits":5,"group_size":32})",
                             R"({"quant_method":"gptq","bits":4,"group_size":0})",
                             R"({"quant_method":"gptq","checkpoint_format":"marlin","bits":4,"group_size":32})"}) {
    Write("config.json", Join("{\"quantization_config\":", config, "}"));
    EXPECT_THAT(ModelFolder::Open(folder_), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("config.json")))
        << config;
  }
}

TEST_F(ModelFolderTest, ARealModelOpens) {
  std::filesystem::path path = std::filesystem::path(REFINERY_SOURCE_DIR) / "../shared/data/models/stories260K/hf";
  if (!std::filesystem::exists(path)) GTEST_SKIP() << "needs " << path;
  auto folder = ModelFolder::Open(path);
  ASSERT_THAT(folder, IsOk());
  for (const std::string& name : (*folder)->Names()) EXPECT_TRUE((*folder)->Get(name)->isfinite().all().item<bool>());
  EXPECT_EQ((*folder)->Get("model.embed_tokens.weight")->size(0), (*folder)->config()["vocab_size"].get<int64_t>());
  EXPECT_NEAR(static_cast<double>((*folder)->ParameterCount()), 260e3, 5e3);
}

}  // namespace
}  // namespace refinery::checkpoint
