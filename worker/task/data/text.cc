#include "worker/task/data/text.h"

#include <locale.h>
#include <wctype.h>

#include <cstdint>

namespace refinery::data {
namespace {

struct CodePoint {
  uint32_t value = 0;
  size_t bytes = 1;
  bool valid = true;
};

// The code point at the start of a non-empty text.
CodePoint Decode(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(text[i]); };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return {lead, 1, true};
  size_t length = 0;
  uint32_t value = 0;
  if ((lead & 0xE0) == 0xC0) length = 2, value = lead & 0x1F;
  else if ((lead & 0xF0) == 0xE0) length = 3, value = lead & 0x0F;
  else if ((lead & 0xF8) == 0xF0) length = 4, value = lead & 0x07;
  if (length == 0 || text.size() < length) return {lead, 1, false};
  for (size_t i = 1; i < length; ++i) {
    if ((byte(i) & 0xC0) != 0x80) return {lead, 1, false};
    value = value << 6 | (byte(i) & 0x3F);
  }
  return {value, length, true};
}

void Append(uint32_t value, std::string* out) {
  const auto put = [&](uint32_t byte) { out->push_back(static_cast<char>(byte)); };
  if (value < 0x80) {
    put(value);
  } else if (value < 0x800) {
    put(0xC0 | value >> 6), put(0x80 | (value & 0x3F));
  } else if (value < 0x10000) {
    put(0xE0 | value >> 12), put(0x80 | (value >> 6 & 0x3F)), put(0x80 | (value & 0x3F));
  } else {
    put(0xF0 | value >> 18), put(0x80 | (value >> 12 & 0x3F)), put(0x80 | (value >> 6 & 0x3F)), put(0x80 | (value & 0x3F));
  }
}

// str.isspace() of Python 3.
bool IsSpace(uint32_t c) {
  return (c >= 0x09 && c <= 0x0D) || (c >= 0x1C && c <= 0x20) || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000;
}

// Case mappings must not depend on the locale that the process happens to run in.
locale_t Utf8Locale() {
  static const locale_t locale = newlocale(LC_CTYPE_MASK, "C.UTF-8", nullptr);
  return locale;
}

uint32_t ToLower(uint32_t c) {
  if (c < 0x80) return c >= 'A' && c <= 'Z' ? c + 32 : c;
  return Utf8Locale() == nullptr ? c : towlower_l(static_cast<wint_t>(c), Utf8Locale());
}

uint32_t ToUpper(uint32_t c) {
  if (c < 0x80) return c >= 'a' && c <= 'z' ? c - 32 : c;
  return Utf8Locale() == nullptr ? c : towupper_l(static_cast<wint_t>(c), Utf8Locale());
}

}  // namespace

std::string_view StripLeft(std::string_view text) {
  while (!text.empty()) {
    const CodePoint c = Decode(text);
    if (!c.valid || !IsSpace(c.value)) break;
    text.remove_prefix(c.bytes);
  }
  return text;
}

std::string_view StripRight(std::string_view text) {
  while (!text.empty()) {
    size_t begin = text.size() - 1;
    while (begin > 0 && text.size() - begin < 4 && (static_cast<uint8_t>(text[begin]) & 0xC0) == 0x80) --begin;
    const CodePoint c = Decode(text.substr(begin));
    if (!c.valid || c.bytes != text.size() - begin || !IsSpace(c.value)) break;
    text.remove_suffix(c.bytes);
  }
  return text;
}

std::string_view Strip(std::string_view text) { return StripLeft(StripRight(text)); }

size_t CodePoints(std::string_view text) {
  size_t count = 0;
  for (; !text.empty(); ++count) text.remove_prefix(Decode(text).bytes);
  return count;
}

std::string Capitalize(std::string_view text) {
  std::string out;
  for (bool first = true; !text.empty(); first = false) {
    const CodePoint c = Decode(text);
    if (!c.valid) {
      out.push_back(text[0]);
    } else if (first && c.value == 0xDF) {
      out += "Ss";
    } else {
      Append(first ? ToUpper(c.value) : ToLower(c.value), &out);
    }
    text.remove_prefix(c.bytes);
  }
  return out;
}

std::string Lower(std::string_view text) {
  std::string out;
  while (!text.empty()) {
    const CodePoint c = Decode(text);
    if (c.valid) Append(ToLower(c.value), &out);
    else out.push_back(text[0]);
    text.remove_prefix(c.bytes);
  }
  return out;
}

std::string ReplaceAll(std::string_view text, std::string_view from, std::string_view to) {
  std::string out;
  for (size_t at = 0; at < text.size();) {
    const size_t hit = text.find(from, at);
    out += text.substr(at, hit == std::string_view::npos ? hit : hit - at);
    if (hit == std::string_view::npos) break;
    out += to;
    at = hit + from.size();
  }
  return out;
}

std::vector<std::string> Words(std::string_view text) {
  std::vector<std::string> words;
  std::string word;
  for (const char raw : text) {
    const uint8_t c = static_cast<uint8_t>(raw);
    if ((c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || c >= 0x80) {
      word.push_back(raw);
    } else if (c >= 'A' && c <= 'Z') {
      word.push_back(static_cast<char>(c + 32));
    } else if (!word.empty()) {
      words.push_back(std::move(word));
      word.clear();
    }
  }
  if (!word.empty()) words.push_back(std::move(word));
  return words;
}

std::string Normalized(std::string_view text) {
  std::string out;
  for (const std::string& word : Words(text)) {
    if (!out.empty()) out += ' ';
    out += word;
  }
  return out;
}

std::vector<std::string> Split(std::string_view text, std::string_view separator) {
  std::vector<std::string> parts;
  for (size_t at = 0;;) {
    const size_t hit = text.find(separator, at);
    parts.emplace_back(text.substr(at, hit == std::string_view::npos ? hit : hit - at));
    if (hit == std::string_view::npos) return parts;
    at = hit + separator.size();
  }
}

}  // namespace refinery::data
