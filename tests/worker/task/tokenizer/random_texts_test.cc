// Tokenizers against their peers on 10,000 random texts: SHA-256 of all ids and of all decoded texts, made by
// tests/vectors/tokenizer/make_random_vectors.py with Hugging Face tokenizers (SentencePiece vocabularies: and sentencepiece
// itself). Tokenizers of released models are checked where they lie (deploy/install_dependencies.sh model).
#include "worker/task/runtime/torch.h"
//
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "common/digest.h"
#include "tests/support/random_texts.h"
#include "tests/support/status_matchers.h"
#include "worker/task/checkpoint/gguf_tokenizer.h"
#include "worker/task/generate/text_stream.h"
#include "worker/task/tokenizer/tokenizer.h"

namespace refinery::tokenizer {
namespace {

using ::refinery::testing::IsOk;
using ::refinery::testing::RandomTexts;
using ::refinery::testing::ReleasedTokenizers;
using nlohmann::json;
namespace fs = std::filesystem;

const fs::path kVectors = fs::path(REFINERY_SOURCE_DIR) / "tests/vectors/tokenizer";
const fs::path kData = fs::path(REFINERY_SOURCE_DIR) / "../shared/data";

fs::path Home() {
  const char* home = std::getenv("HOME");
  return home == nullptr ? "/" : home;
}

// Writes the metadata of a GGUF file: strings, numbers and arrays of them.
class GgufText {
 public:
  void Put(const std::string& key, const std::string& value) { Key(key, 8), String(value); }
  void Put(const std::string& key, uint32_t value) { Key(key, 4), Bytes(&value, 4); }
  void Put(const std::string& key, const std::vector<std::string>& values) {
    Array(key, 8, values.size());
    for (const std::string& value : values) String(value);
  }
  void Put(const std::string& key, const std::vector<float>& values) {
    Array(key, 6, values.size());
    Bytes(values.data(), values.size() * 4);
  }
  void Put(const std::string& key, const std::vector<int32_t>& values) {
    Array(key, 5, values.size());
    Bytes(values.data(), values.size() * 4);
  }
  std::string Finish() const {
    std::string head("GGUF\x03\0\0\0", 8);
    const uint64_t counts[] = {0, count_};
    head.append(reinterpret_cast<const char*>(counts), sizeof counts);
    return head + text_ + std::string(64, '\0');
  }

 private:
  void Bytes(const void* data, size_t size) { text_.append(static_cast<const char*>(data), size); }
  void String(const std::string& value) {
    const uint64_t size = value.size();
    Bytes(&size, 8);
    text_ += value;
  }
  void Key(const std::string& key, uint32_t type) {
    String(key);
    Bytes(&type, 4);
    ++count_;
  }
  void Array(const std::string& key, uint32_t type, uint64_t size) {
    Key(key, 9);
    Bytes(&type, 4);
    Bytes(&size, 8);
  }

  std::string text_;
  uint64_t count_ = 0;
};

class RandomTextsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = fs::temp_directory_path() / Join("refinery_random_texts_test.", static_cast<int64_t>(::getpid()));
    fs::create_directories(folder_);
  }
  void TearDown() override { fs::remove_all(folder_); }

  std::shared_ptr<const Tokenizer> FromGguf(const fs::path& path) {
    auto file = checkpoint::GgufFile::Open(path);
    EXPECT_THAT(file, IsOk());
    auto files = checkpoint::TokenizerFromGguf(**file);
    EXPECT_THAT(files, IsOk());
    if (!files.ok()) return nullptr;
    std::ofstream(folder_ / "tokenizer.json") << files->tokenizer_json;
    std::ofstream(folder_ / "tokenizer_config.json") << files->tokenizer_config_json;
    return Load(folder_);
  }

  std::shared_ptr<const Tokenizer> Load(const fs::path& folder) {
    auto tokenizer = Tokenizer::Load(folder);
    EXPECT_THAT(tokenizer, IsOk());
    return tokenizer.ok() ? *tokenizer : nullptr;
  }

  // GPT-2's own two files as one tokenizer.json.
  std::shared_ptr<const Tokenizer> Gpt2(const fs::path& folder) {
    json merges = json::array();
    std::ifstream lines(folder / "vocab.bpe");
    std::string line;
    std::getline(lines, line);  // "#version: 0.2"
    while (std::getline(lines, line))
      if (!line.empty()) merges.push_back(line);
    json ids = json::parse(*ReadFile(folder / "encoder.json"));
    json level = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"trim_offsets", true}, {"use_regex", true}};
    json end = {{"id", ids["<|endoftext|>"]}, {"content", "<|endoftext|>"}, {"single_word", false}, {"lstrip", false},
                {"rstrip", false}, {"normalized", true}, {"special", true}};
    json whole = {{"version", "1.0"}, {"added_tokens", json::array({end})}, {"normalizer", nullptr},
                  {"pre_tokenizer", level}, {"post_processor", nullptr}, {"decoder", level},
                  {"model", {{"type", "BPE"}, {"vocab", ids}, {"merges", merges}}}};
    std::ofstream(folder_ / "tokenizer.json") << whole.dump();
    return Load(folder_);
  }

  // stories260K's vocabulary (llama2.c: size of the longest, then score, size, text of each) as a GGUF file.
  std::shared_ptr<const Tokenizer> Stories() {
    std::string data = *ReadFile(kData / "models/stories260K/tok512.bin");
    std::vector<std::string> tokens;
    std::vector<float> scores;
    std::vector<int32_t> types;
    for (size_t at = 4; at + 8 <= data.size();) {
      float score;
      int32_t size;
      std::memcpy(&score, &data[at], 4);
      std::memcpy(&size, &data[at + 4], 4);
      std::string text = data.substr(at + 8, static_cast<size_t>(size));
      at += 8 + static_cast<size_t>(size);
      const bool byte = text.size() == 6 && text.starts_with("<0x");
      for (size_t blank; (blank = text.find(' ')) != std::string::npos;) text.replace(blank, 1, "\u2581");
      const size_t id = tokens.size();
      tokens.push_back(id < 3 ? std::vector<std::string>{"<unk>", "<s>", "</s>"}[id] : text);
      types.push_back(id == 0 ? 2 : id < 3 ? 3 : byte ? 6 : 1);
      scores.push_back(score);
    }
    GgufText gguf;
    gguf.Put("general.architecture", std::string("llama"));
    gguf.Put("tokenizer.ggml.model", std::string("llama"));
    gguf.Put("tokenizer.ggml.tokens", tokens);
    gguf.Put("tokenizer.ggml.scores", scores);
    gguf.Put("tokenizer.ggml.token_type", types);
    gguf.Put("tokenizer.ggml.unknown_token_id", uint32_t{0});
    gguf.Put("tokenizer.ggml.bos_token_id", uint32_t{1});
    gguf.Put("tokenizer.ggml.eos_token_id", uint32_t{2});
    std::ofstream(folder_ / "stories.gguf") << gguf.Finish();
    return FromGguf(folder_ / "stories.gguf");
  }

  void Compare(const std::string& name, const std::shared_ptr<const Tokenizer>& tokenizer) {
    SCOPED_TRACE(name);
    ASSERT_NE(tokenizer, nullptr);
    const json expected = json::parse(*ReadFile(kVectors / "random_digests.json"));
    const std::vector<std::string> texts = RandomTexts();
    ASSERT_EQ(json(std::vector<std::string>(texts.begin(), texts.begin() + 3)), expected["first"]);
    Sha256 all_ids, all_texts;
    for (size_t i = 0; i < texts.size(); ++i) {
      auto ids = tokenizer->Encode(texts[i]);
      ASSERT_THAT(ids, IsOk());
      for (size_t k = 0; k < ids->size(); ++k) all_ids.Update(Join(k > 0 ? "," : "", (*ids)[k]));
      all_ids.Update("\n");
      auto decoded = tokenizer->Decode(*ids);
      ASSERT_THAT(decoded, IsOk());
      all_texts.Update(*decoded + "\n");
      if (i < 500) ExpectStreams(tokenizer, *ids, *decoded);
    }
    EXPECT_EQ(all_ids.Finish(), "sha256:" + expected["digests"][name]["ids"].get<std::string>());
    EXPECT_EQ(all_texts.Finish(), "sha256:" + expected["digests"][name]["texts"].get<std::string>());
  }

  // Goal: text that appears token by token is the text, and no piece ends within a character.
  void ExpectStreams(const std::shared_ptr<const Tokenizer>& tokenizer, const std::vector<int32_t>& ids,
                     const std::string& whole) {
    generate::TextStream stream(tokenizer, {});
    std::string text;
    for (int32_t id : ids) {
      auto piece = stream.Push(id);
      ASSERT_THAT(piece, IsOk());
      EXPECT_NO_THROW(json(*piece).dump()) << "a piece is not valid UTF-8";
      text += *piece;
    }
    auto rest = stream.Finish();
    ASSERT_THAT(rest, IsOk());
    EXPECT_EQ(text + *rest, whole);
  }

  fs::path folder_;
};

TEST_F(RandomTextsTest, Gpt2VocabulariesFromGguf) { Compare("gpt-2", FromGguf(kVectors / "gpt-2.gguf")); }
TEST_F(RandomTextsTest, SmolLmVocabulariesFromGguf) { Compare("smollm", FromGguf(kVectors / "smollm.gguf")); }
TEST_F(RandomTextsTest, Qwen2VocabulariesFromGguf) { Compare("qwen2", FromGguf(kVectors / "qwen2.gguf")); }
TEST_F(RandomTextsTest, Llama3VocabulariesFromGguf) { Compare("llama-bpe", FromGguf(kVectors / "llama-bpe.gguf")); }
TEST_F(RandomTextsTest, SentencePieceVocabulariesFromGguf) {
  Compare("sentencepiece", FromGguf(kVectors / "sentencepiece.gguf"));
}

TEST_F(RandomTextsTest, SmolLm2) {
  const char* named = std::getenv("REFINERY_TEST_MODEL");
  const fs::path model = named != nullptr ? fs::path(named) : Home() / ".cache/refinery/models/SmolLM2-135M-Instruct.Q4_1.gguf";
  if (!fs::exists(model)) GTEST_SKIP() << "needs " << model << " (deploy/install_dependencies.sh model)";
  Compare("smollm2", FromGguf(model));
}

TEST_F(RandomTextsTest, Stories260K) {
  if (!fs::exists(kData / "models/stories260K/tok512.bin")) GTEST_SKIP() << "needs " << kData;
  std::shared_ptr<const Tokenizer> tokenizer = Stories();
  Compare("stories260K", tokenizer);
  // The published story: its ids and its text.
  const json golden = json::parse(*ReadFile(kData / "models/stories260K/golden.json"));
  auto story = tokenizer->Decode(golden["ids"].get<std::vector<int32_t>>());
  ASSERT_THAT(story, IsOk());
  // The published text shows a byte token by its name and the blank before a text, which is the tokenizer's own.
  std::string published = golden["text"];
  const std::string line_break = "<0x0A>";
  for (size_t at; (at = published.find(line_break)) != std::string::npos;) published.replace(at, line_break.size(), "\n");
  EXPECT_EQ(" " + *story, published);
}

TEST_F(RandomTextsTest, ReleasedLlama31Qwen3AndGpt2) {
  if (!fs::exists(ReleasedTokenizers() / "qwen3/tokenizer.json"))
    GTEST_SKIP() << "needs " << ReleasedTokenizers() << " (deploy/install_dependencies.sh model)";
  Compare("llama3_1", Load(ReleasedTokenizers() / "llama3_1"));
  Compare("qwen3", Load(ReleasedTokenizers() / "qwen3"));
  Compare("gpt2", Gpt2(ReleasedTokenizers() / "gpt2"));
}

// Goal: the 47 strings of llama.cpp's own tests.  Method: its ids, without special tokens.
TEST_F(RandomTextsTest, LlamaCppVocabularyTests) {
  if (!fs::exists(ReleasedTokenizers() / "qwen3/tokenizer.json") || !fs::exists(kData / "tokenizers"))
    GTEST_SKIP() << "needs " << ReleasedTokenizers() << " and " << kData / "tokenizers";
  const std::vector<std::pair<std::string, std::shared_ptr<const Tokenizer>>> families = {
      {"gpt-2", Gpt2(ReleasedTokenizers() / "gpt2")},
      {"llama-bpe", Load(ReleasedTokenizers() / "llama3_1")},
      {"qwen2", Load(ReleasedTokenizers() / "qwen3")}};
  for (const auto& [family, tokenizer] : families) {
    ASSERT_NE(tokenizer, nullptr);
    const std::string input = *ReadFile(kData / "tokenizers" / ("ggml-vocab-" + family + ".gguf.inp"));
    std::ifstream output(kData / "tokenizers" / ("ggml-vocab-" + family + ".gguf.out"));
    const std::string border = "\n__ggml_vocab_test__\n";
    int count = 0;
    std::string line;
    for (size_t at = 0; at <= input.size() && std::getline(output, line); ++count) {
      const size_t end = std::min(input.find(border, at), input.size());
      std::istringstream numbers(line);
      std::vector<int32_t> ids;
      for (int32_t id; numbers >> id;) ids.push_back(id);
      const std::string text = input.substr(at, end - at);
      EXPECT_THAT(tokenizer->Encode(text, false), ::refinery::testing::IsOkAndHolds(ids)) << family << ": " << json(text);
      at = end + border.size();
    }
    EXPECT_GE(count, 46) << family;
  }
}

}  // namespace
}  // namespace refinery::tokenizer
