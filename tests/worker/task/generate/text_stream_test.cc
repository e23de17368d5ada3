#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include "worker/task/generate/text_stream.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>

#include "tests/support/status_matchers.h"
#include "tests/worker/task/generate/small_tokenizer.h"

namespace refinery::generate {
namespace {

using ::refinery::testing::IsOk;

// The end of the earliest occurrence that ends first, by trying every place.
std::string CutByDefinition(const std::string& text, const std::vector<std::string>& stops, bool* stopped) {
  for (size_t end = 1; end <= text.size(); ++end) {
    size_t begin = std::string::npos;
    for (const std::string& stop : stops) {
      if (!stop.empty() && std::string_view(text).substr(0, end).ends_with(stop)) begin = std::min(begin, end - stop.size());
    }
    if (begin != std::string::npos) {
      *stopped = true;
      return text.substr(0, begin);
    }
  }
  *stopped = false;
  return text;
}

// Whether the bytes are whole UTF-8 characters.
bool IsWhole(const std::string& text) {
  for (size_t i = 0; i < text.size();) {
    const auto first = static_cast<unsigned char>(text[i]);
    const size_t length = first < 0x80 ? 1 : first >= 0xF0 ? 4 : first >= 0xE0 ? 3 : first >= 0xC2 ? 2 : 0;
    if (length == 0 || i + length > text.size()) return false;
    for (size_t k = 1; k < length; ++k) {
      if ((static_cast<unsigned char>(text[i + k]) & 0xC0) != 0x80) return false;
    }
    i += length;
  }
  return true;
}

// Goal: stop strings are found wherever pieces begin and end, and nothing of one is let through.  Method: 2,000 random texts of
// three letters, cut at random, against the definition.
TEST(StopFinderTest, FindsStopsAcrossPieces) {
  std::mt19937 random(1);
  const auto word = [&](size_t longest) {
    std::string text(random() % longest + 1, ' ');
    for (char& c : text) c = static_cast<char>('a' + random() % 3);
    return text;
  };
  size_t stopped_texts = 0;
  for (int round = 0; round < 2000; ++round) {
    const std::string text = word(30);
    std::vector<std::string> stops;
    for (size_t i = random() % 4; i > 0; --i) stops.push_back(word(5));
    bool stopped = false;
    const std::string expected = CutByDefinition(text, stops, &stopped);
    StopFinder finder(stops);
    std::string out;
    for (size_t i = 0; i < text.size();) {
      const size_t length = std::min<size_t>(random() % 4 + 1, text.size() - i);
      out += finder.Push(text.substr(i, length));
      ASSERT_TRUE(expected.starts_with(out));
      i += length;
    }
    out += finder.Finish();
    EXPECT_EQ(out, expected);
    EXPECT_EQ(finder.stopped(), stopped);
    stopped_texts += stopped;
  }
  EXPECT_GT(stopped_texts, 500);
  EXPECT_LT(stopped_texts, 1900);
}

// Goal: text is withheld only as long as a stop string may come of it.
TEST(StopFinderTest, LetsThroughWhatIsCertain) {
  StopFinder finder({"END", "\n\n"});
  EXPECT_EQ(finder.Push("one E"), "one ");
  EXPECT_EQ(finder.Push("N"), "");
  EXPECT_EQ(finder.Push("T\n"), "ENT");
  EXPECT_EQ(finder.Push("x"), "\nx");
  EXPECT_EQ(finder.Push("y\n\nz"), "y");
  EXPECT_TRUE(finder.stopped());
  EXPECT_EQ(finder.Push("END"), "");
  EXPECT_EQ(finder.Finish(), "");
}

struct Streamed {
  std::vector<std::string> pieces;
  std::string text;
  bool stopped = false;
};

Streamed Stream(const std::shared_ptr<const tokenizer::Tokenizer>& tokenizer, const std::vector<int32_t>& tokens,
                const std::vector<std::string>& stops) {
  TextStream stream(tokenizer, stops);
  Streamed out;
  for (int32_t token : tokens) {
    StatusOr<std::string> piece = stream.Push(token);
    EXPECT_THAT(piece, IsOk());
    out.pieces.push_back(*piece);
    out.text += *piece;
  }
  const StatusOr<std::string> rest = stream.Finish();
  EXPECT_THAT(rest, IsOk());
  out.text += *rest;
  out.stopped = stream.stopped();
  return out;
}

// Tokens of texts whose characters take one to four bytes, and random tokens, among them broken characters.
std::vector<std::vector<int32_t>> TokenLists(const tokenizer::Tokenizer& tokenizer) {
  std::vector<std::vector<int32_t>> lists;
  for (const char* text : {"The naïve café cost 5 €. 你好，世界! 🙂🙂 and 👩‍👩‍👧 end", " leading space", "\n\n\ttabs\n", "один два три",
                           "a\xEF\xBF\xBD" "b\xEF\xBF\xBD", "don't  stop   now", ""}) {
    lists.push_back(*tokenizer.Encode(text, /*add_special_tokens=*/false));
  }
  std::mt19937 random(2);
  for (int i = 0; i < 200; ++i) {
    std::vector<int32_t>& list = lists.emplace_back(random() % 40);
    for (int32_t& token : list) token = static_cast<int32_t>(random() % static_cast<uint64_t>(tokenizer.vocab_size()));
  }
  return lists;
}

// Goal: the pieces of a byte-level tokenizer's tokens join to the text of all tokens, none ends within a character, and a stop
// string cuts them where it cuts the whole text.  Oracle: the tokenizer on all tokens at once (itself checked against Hugging
// Face's), cut by definition; stops are random parts of the text.
TEST(TextStreamTest, PiecesJoinToTheWholeText) {
  for (const char* vocabulary : {"smollm", "gpt-2", "qwen2", "llama-bpe"}) {
    const testing::SmallTokenizer small(vocabulary);
    const auto tokenizer = small.get();
    std::mt19937 random(3);
    for (const std::vector<int32_t>& tokens : TokenLists(*tokenizer)) {
      const std::string whole = *tokenizer->Decode(tokens);
      const Streamed plain = Stream(tokenizer, tokens, {});
      EXPECT_EQ(plain.text, whole);
      for (const std::string& piece : plain.pieces) EXPECT_TRUE(IsWhole(piece)) << ::testing::PrintToString(piece);
      std::vector<std::string> stops;
      for (int i = 0; i < 3 && !whole.empty(); ++i) stops.push_back(whole.substr(random() % whole.size(), random() % 6 + 1));
      bool stopped = false;
      const std::string expected = CutByDefinition(whole, stops, &stopped);
      const Streamed cut = Stream(tokenizer, tokens, stops);
      EXPECT_EQ(cut.text, expected);
      EXPECT_EQ(cut.stopped, stopped);
    }
  }
}

// A tokenizer.json in the form of Llama 2's: a space becomes a mark that decoding takes away again at the beginning, and letters
// without a token are spelled in bytes.
nlohmann::json SentencePieceLike() {
  nlohmann::json vocabulary = {{"<unk>", 0}};
  int next = 1;
  for (int byte = 0; byte < 256; ++byte) {
    char name[8];
    std::snprintf(name, sizeof(name), "<0x%02X>", static_cast<unsigned>(byte));
    vocabulary[name] = next++;
  }
  vocabulary["\u2581"] = next++;
  for (char c = 'a'; c <= 'z'; ++c) vocabulary[std::string(1, c)] = next++;
  vocabulary["\u2581a"] = next++;
  const nlohmann::json mark = {{"type", "Replace"}, {"pattern", {{"String", " "}}}, {"content", "\u2581"}};
  const nlohmann::json space = {{"type", "Replace"}, {"pattern", {{"String", "\u2581"}}}, {"content", " "}};
  return {{"version", "1.0"},
          {"added_tokens", nlohmann::json::array()},
          {"normalizer", {{"type", "Sequence"}, {"normalizers", {{{"type", "Prepend"}, {"prepend", "\u2581"}}, mark}}}},
          {"pre_tokenizer", nullptr},
          {"post_processor", nullptr},
          {"decoder",
           {{"type", "Sequence"},
            {"decoders",
             {space, {{"type", "ByteFallback"}}, {{"type", "Fuse"}},
              {{"type", "Strip"}, {"content", " "}, {"start", 1}, {"stop", 0}}}}}},
          {"model",
           {{"type", "BPE"}, {"unk_token", "<unk>"}, {"fuse_unk", true}, {"byte_fallback", true}, {"vocab", vocabulary},
            {"merges", {"\u2581 a"}}}}};
}

// Goal: the same with SentencePiece's ways.
TEST(TextStreamTest, SentencePieceTokensStream) {
  const std::filesystem::path folder =
      std::filesystem::temp_directory_path() / ("refinery_text_stream_test." + std::to_string(::getpid()));
  std::filesystem::create_directories(folder);
  std::ofstream(folder / "tokenizer.json") << SentencePieceLike().dump();
  const StatusOr<std::shared_ptr<const tokenizer::Tokenizer>> tokenizer = tokenizer::Tokenizer::Load(folder);
  std::filesystem::remove_all(folder);
  ASSERT_THAT(tokenizer, IsOk());
  for (const char* text : {"once upon a time", "the naïve café 你好 🙂 end", "  two spaces", "a\nb", "你"}) {
    const std::vector<int32_t> tokens = *(*tokenizer)->Encode(text, false);
    const std::string whole = *(*tokenizer)->Decode(tokens);
    EXPECT_EQ(whole, text);
    const Streamed streamed = Stream(*tokenizer, tokens, {});
    EXPECT_EQ(streamed.text, whole);
    size_t early = 0;  // text comes with its token, not at the end
    for (const std::string& piece : streamed.pieces) {
      EXPECT_TRUE(IsWhole(piece));
      early += piece.size();
    }
    EXPECT_EQ(early, whole.size());
  }
}

}  // namespace
}  // namespace refinery::generate
