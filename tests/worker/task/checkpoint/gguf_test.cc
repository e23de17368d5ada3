// GGUF: dequantization bit by bit against gguf-py (tests/vectors/gguf/make_vectors.py), and damaged files.
#include "worker/task/runtime/torch.h"
//
#include "worker/task/checkpoint/gguf.h"

#include <cstring>
#include <nlohmann/json.hpp>

#include "tests/support/status_matchers.h"
#include "tests/worker/task/checkpoint/folder_fixture.h"
#include "worker/task/checkpoint/gguf_model.h"
#include "worker/task/checkpoint/gguf_tokenizer.h"
#include "worker/task/checkpoint/utf8.h"

namespace refinery::checkpoint {
namespace {

using ::refinery::testing::IsOk;
using ::refinery::testing::StatusIs;
using ::testing::HasSubstr;
using nlohmann::json;

const std::filesystem::path kVectors = std::filesystem::path(REFINERY_SOURCE_DIR) / "tests/vectors";

std::string FromBase64(const std::string& text) {
  const std::string kAlphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string bytes;
  uint32_t bits = 0;
  int count = 0;
  for (char c : text) {
    size_t value = kAlphabet.find(c);
    if (value == std::string::npos) break;
    bits = bits << 6 | static_cast<uint32_t>(value);
    count += 6;
    if (count >= 8) bytes += static_cast<char>(bits >> (count -= 8) & 0xFF);
  }
  return bytes;
}

class GgufTest : public FolderTest {};

TEST_F(GgufTest, EveryTypeDequantizesBitForBitAsInGgufPy) {
  json vectors = json::parse(*ReadFile(kVectors / "gguf/blocks.json"));
  EXPECT_EQ(vectors["types"].size(), 14u);
  for (const auto& [name, vector] : vectors["types"].items()) {
    const GgufType* type = FindGgufType(vector["id"].get<uint32_t>());
    ASSERT_NE(type, nullptr) << name;
    EXPECT_EQ(type->name, name);
    EXPECT_EQ(type->block_size, vector["block_size"]);
    EXPECT_EQ(type->block_bytes, vector["block_bytes"]);
    std::string blocks = FromBase64(vector["blocks"]), expected = FromBase64(vector["values"]);
    int64_t count = static_cast<int64_t>(blocks.size()) / type->block_bytes;
    std::vector<float> values(static_cast<size_t>(count * type->block_size));
    ASSERT_EQ(values.size() * sizeof(float), expected.size()) << name;
    type->dequantize(reinterpret_cast<const uint8_t*>(blocks.data()), count, values.data());
    EXPECT_EQ(std::memcmp(values.data(), expected.data(), expected.size()), 0) << name;
  }
}

// Version 2 is laid out like version 3.
TEST_F(GgufTest, ReadsVersionTwo) {
  std::string bytes = *ReadFile(kVectors / "gguf/tiny.gguf");
  ASSERT_EQ(bytes[4], 3);
  auto three = GgufFile::Open(Write("three.gguf", bytes));
  bytes[4] = 2;
  auto two = GgufFile::Open(Write("two.gguf", bytes));
  ASSERT_THAT(two, IsOk());
  EXPECT_EQ((*two)->metadata().size(), (*three)->metadata().size());
  for (const auto& [name, tensor] : (*three)->tensors())
    EXPECT_TRUE(at::equal(*(*two)->Dequantize(name), *(*three)->Dequantize(name))) << name;
}

TEST_F(GgufTest, ReadsMetadataOfEveryKind) {
  auto file = GgufFile::Open(kVectors / "tokenizer/smollm.gguf");
  ASSERT_THAT(file, IsOk());
  EXPECT_EQ((*file)->String("general.architecture"), "llama");
  EXPECT_EQ((*file)->Int("llama.context_length"), 128);
  EXPECT_EQ((*file)->Strings("tokenizer.ggml.tokens")->at(1), "<|end|>");
  EXPECT_EQ((*file)->Ints("tokenizer.ggml.token_type")->at(1), 3);
  EXPECT_EQ((*file)->Int("nothing"), std::nullopt);
  EXPECT_EQ((*file)->String("llama.context_length"), std::nullopt) << "of another kind";
}

TEST_F(GgufTest, RefusesOtherFilesAndTypesInOneSentence) {
  EXPECT_THAT(GgufFile::Open(folder_ / "none.gguf"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("none.gguf")));
  EXPECT_THAT(GgufFile::Open(Write("a.gguf", "")), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("a.gguf")));
  EXPECT_THAT(GgufFile::Open(Write("a.gguf", "PK\x03\x04 and so on")),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("not a GGUF file")));
  std::string old("GGUF\x01\0\0\0", 8);
  EXPECT_THAT(GgufFile::Open(Write("a.gguf", old)),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("version 1")));
  // One tensor "w" [32] of ggml type 16 (IQ2_XXS), which is not read.
  std::string unknown("GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0", 24);
  unknown += std::string("\x01\0\0\0\0\0\0\0w\x01\0\0\0\x20\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\0\0\0\0", 33);
  EXPECT_THAT(GgufFile::Open(Write("a.gguf", unknown)),
              StatusIs(absl::StatusCode::kInvalidArgument,
                       HasSubstr("tensor type 16, which is not supported (known: F32")));
}

// Goal: no GGUF file, however damaged, ends the process; the message names the file.  Method: a whole small model and a
// vocabulary, cut at many lengths and with bytes changed, through every step of an import.
TEST_F(GgufTest, DamagedFilesNeverCrash) {
  for (const char* name : {"gguf/tiny.gguf", "tokenizer/llama-bpe.gguf"}) {
    std::string original = *ReadFile(kVectors / name);
    int refused = 0;
    for (int round = 0; round < 1200; ++round) {
      auto file = GgufFile::Open(Write("damaged.gguf", Damage(original, round, 200)));
      Status status = file.status();
      if (file.ok()) {
        for (const auto& [tensor_name, tensor] : (*file)->tensors())
          EXPECT_EQ((*file)->Dequantize(tensor_name)->numel(), tensor.rows() * tensor.row_size());
        status = TokenizerFromGguf(**file).status();
        if (status.ok()) status = WriteGgufModelFolder(**file, folder_);
      }
      if (status.ok()) continue;
      ++refused;
      EXPECT_THAT(Message(status), HasSubstr("damaged.gguf")) << round;
    }
    EXPECT_GT(refused, 300) << name;
  }
}

TEST(Utf8Test, AcceptsExactlyWellFormedText) {
  for (const char* good : {"", "a", "\xc2\xa2", "\xe2\x82\xac", "\xf0\x9f\x98\x80", "\xed\x9f\xbf", "\xf4\x8f\xbf\xbf"})
    EXPECT_TRUE(IsUtf8(good)) << good;
  for (const char* bad : {"\x80", "\xc0\xaf", "\xc1\x81", "\xe0\x80\xaf", "\xed\xa0\x80", "\xf4\x90\x80\x80",
                          "\xf5\x80\x80\x80", "\xe2\x82", "\xc2", "\xff", "a\xf0\x9f\x98"})
    EXPECT_FALSE(IsUtf8(bad)) << bad;
}

}  // namespace
}  // namespace refinery::checkpoint
