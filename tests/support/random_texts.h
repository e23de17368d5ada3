// tests/support/random_texts.h
//
// The 10,000 texts of tests/vectors/tokenizer/random_texts.py (which describes them), and what tests of tokenizers need
// beside them.

#pragma once

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "common/files.h"

namespace refinery::testing {

// splitmix64 (Steele, Lea, Flood 2014).
class SplitMix {
 public:
  explicit SplitMix(uint64_t seed) : state_(seed) {}
  uint64_t Below(uint64_t bound) {
    uint64_t z = state_ += 0x9E3779B97F4A7C15;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB;
    return (z ^ (z >> 31)) % bound;
  }

 private:
  uint64_t state_;
};

inline std::string Utf8(uint64_t code) {
  auto byte = [](uint64_t value) { return static_cast<char>(value); };
  if (code < 0x80) return {byte(code)};
  if (code < 0x800) return {byte(0xC0 | code >> 6), byte(0x80 | (code & 63))};
  if (code < 0x10000) return {byte(0xE0 | code >> 12), byte(0x80 | (code >> 6 & 63)), byte(0x80 | (code & 63))};
  return {byte(0xF0 | code >> 18), byte(0x80 | (code >> 12 & 63)), byte(0x80 | (code >> 6 & 63)), byte(0x80 | (code & 63))};
}

inline std::vector<std::string> RandomTexts(int count = 10'000, uint64_t seed = 20'240'726) {
  const auto pieces = nlohmann::json::parse(
      *ReadFile(std::filesystem::path(REFINERY_SOURCE_DIR) / "tests/vectors/tokenizer/pieces.json"));
  SplitMix random(seed);
  std::vector<std::string> texts;
  for (int i = 0; i < count; ++i) {
    std::string text;
    for (uint64_t left = 1 + random.Below(24); left > 0; --left) {
      if (random.Below(10) == 0) {
        const uint64_t code = 1 + random.Below(0x10FFFF - 0x800);
        text += Utf8(code < 0xD800 ? code : code + 0x800);
        continue;
      }
      const auto& list = pieces[random.Below(pieces.size())];
      const auto& piece = list[random.Below(list.size())].get_ref<const std::string&>();
      for (uint64_t times = 1 + (random.Below(6) == 0 ? random.Below(4) : 0); times > 0; --times) text += piece;
    }
    texts.push_back(text);
  }
  return texts;
}

// Where deploy/install_dependencies.sh puts the tokenizers of released models.
inline std::filesystem::path ReleasedTokenizers() {
  if (const char* folder = std::getenv("REFINERY_TOKENIZERS_DIR")) return folder;
  const char* home = std::getenv("HOME");
  return std::filesystem::path(home != nullptr ? home : "") / ".cache/refinery/tokenizers";
}

}  // namespace refinery::testing
