// worker/task/checkpoint/utf8.h
//
// Whether bytes are valid UTF-8 (no overlong forms, no surrogates, at most U+10FFFF). JSON can hold nothing else.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace refinery::checkpoint {

inline bool IsUtf8(std::string_view text) {
  size_t i = 0;
  while (i < text.size()) {
    auto first = static_cast<unsigned char>(text[i++]);
    if (first < 0x80) continue;
    int more = 0;
    if (first >= 0xC2 && first <= 0xDF) more = 1;
    if (first >= 0xE0 && first <= 0xEF) more = 2;
    if (first >= 0xF0 && first <= 0xF4) more = 3;
    if (more == 0 || text.size() - i < static_cast<size_t>(more)) return false;
    uint32_t code = first & (0x3F >> more);
    for (int k = 0; k < more; ++k) {
      auto next = static_cast<unsigned char>(text[i++]);
      if ((next & 0xC0) != 0x80) return false;
      code = code << 6 | (next & 0x3F);
    }
    if ((more == 2 && code < 0x800) || (more == 3 && (code < 0x10000 || code > 0x10FFFF))) return false;
    if (code >= 0xD800 && code <= 0xDFFF) return false;
  }
  return true;
}

}  // namespace refinery::checkpoint
