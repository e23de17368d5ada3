// tests/support/byte_mutator.h
//
// Seeded damage to bytes, for tests that read what others have written. The same seed does the same damage on every machine (the
// sequence of mt19937 is fixed by the standard; distributions are not used).
//
// Threads: one.

#pragma once

#include <algorithm>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

namespace refinery::testing {

class ByteMutator {
 public:
  explicit ByteMutator(uint32_t seed) : random_(seed) {}

  size_t Below(size_t bound) { return bound == 0 ? 0 : random_() % bound; }

  // One to four edits: bits, cuts, doubled and lost pieces, bytes that are no UTF-8, long runs, pieces of `words` put in.
  std::string Bytes(std::string text, const std::vector<std::string>& words = {}) {
    for (size_t edits = 1 + Below(4); edits > 0; --edits) Edit(&text, words);
    return text;
  }

 private:
  void Edit(std::string* text, const std::vector<std::string>& words) {
    const size_t at = Below(text->size() + 1);
    const size_t size = std::min<size_t>(1 + Below(24), text->size() - at);
    switch (Below(words.empty() ? 7 : 9)) {
      case 0: text->resize(at); return;
      case 1: text->erase(at, size); return;
      case 2: text->insert(at, text->substr(at, size)); return;
      case 3: text->insert(at, std::string("\xff\xc0\xaf\xed\xa0\x80", 1 + Below(6))); return;
      case 4: text->insert(at, 1 + Below(300), "[{(\"\n\t 9\0"[Below(9)]); return;
      case 5:
      case 6:
        if (at < text->size()) (*text)[at] = static_cast<char>((*text)[at] ^ (1 << Below(8)));
        return;
      default: text->replace(at, Below(2) * size, words[Below(words.size())]);
    }
  }

  std::mt19937 random_;
};

}  // namespace refinery::testing
