// The corpus maker: every mutation follows from the seed's structure and a fixed random sequence.

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <random>

#include "common/status.h"
#include "tests/fuzz/fuzz_target.h"

namespace refinery::fuzz {
namespace {

using Json = nlohmann::ordered_json;

constexpr size_t kFlips = 40, kSplices = 40, kTokenEdits = 60;
constexpr size_t kMostNodes = 120;

struct Maker {
  std::vector<Input> inputs;
  std::mt19937 random{20240229};   // its sequence is fixed by the standard; distributions are not

  size_t Below(size_t bound) { return bound == 0 ? 0 : random() % bound; }
  void Add(const std::string& name, std::string bytes) { inputs.push_back({name, std::move(bytes)}); }
};

void Truncations(Maker& maker, const Seed& seed) {
  std::vector<size_t> ends = {0, 1, 4, 7, 8, 9, seed.bytes.size() / 2, seed.bytes.size() - 1};
  for (const Field& field : seed.fields) {
    ends.push_back(field.offset);
    ends.push_back(field.offset + field.width - 1);
    ends.push_back(field.offset + field.width);
  }
  std::sort(ends.begin(), ends.end());
  ends.erase(std::unique(ends.begin(), ends.end()), ends.end());
  for (size_t end : ends)
    if (end < seed.bytes.size()) maker.Add(Join(seed.name, " cut at ", end), seed.bytes.substr(0, end));
  maker.Add(Join(seed.name, " with a tail"), seed.bytes + std::string(4097, '\xff'));
}

void FieldValues(Maker& maker, const Seed& seed) {
  for (const Field& field : seed.fields) {
    uint64_t now = 0;
    std::memcpy(&now, seed.bytes.data() + field.offset, field.width);
    for (uint64_t value : {uint64_t{0}, uint64_t{1}, now + 1, now - 1, now * 2, uint64_t{0x7f}, uint64_t{0xff}, uint64_t{0xffff},
                           uint64_t{1} << 24, uint64_t{0x7fffffff}, uint64_t{0xffffffff}, uint64_t{1} << 40, uint64_t{INT64_MAX},
                           uint64_t{1} << 63, UINT64_MAX - 7, UINT64_MAX, static_cast<uint64_t>(seed.bytes.size())}) {
      std::string bytes = seed.bytes;
      std::memcpy(bytes.data() + field.offset, &value, field.width);
      if (bytes != seed.bytes) maker.Add(Join(seed.name, " with ", value, " at ", field.offset), std::move(bytes));
    }
  }
}

void Flips(Maker& maker, const Seed& seed) {
  for (size_t i = 0; i < kFlips && !seed.bytes.empty(); ++i) {
    std::string bytes = seed.bytes;
    const size_t flips = 1 + maker.Below(4);
    for (size_t j = 0; j < flips; ++j) bytes[maker.Below(bytes.size())] ^= static_cast<char>(1 << maker.Below(8));
    maker.Add(Join(seed.name, " flipped ", i), std::move(bytes));
  }
}

// Pieces left out, doubled, or replaced by bytes that are no UTF-8.
void Splices(Maker& maker, const Seed& seed) {
  for (size_t i = 0; i < kSplices && seed.bytes.size() > 1; ++i) {
    const size_t at = maker.Below(seed.bytes.size());
    const size_t size = 1 + maker.Below(std::min<size_t>(64, seed.bytes.size() - at));
    const std::string piece = seed.bytes.substr(at, size);
    const std::string into = i % 3 == 0 ? "" : i % 3 == 1 ? piece + piece : std::string("\xff\xc0\xaf\xed\xa0\x80") + '\0';
    maker.Add(Join(seed.name, " spliced ", i), seed.bytes.substr(0, at) + into + seed.bytes.substr(at + size));
  }
}

void Nodes(Json& json, std::vector<Json::json_pointer>& nodes, const Json::json_pointer& here) {
  nodes.push_back(here);
  if (json.is_object())
    for (auto& [key, value] : json.items()) Nodes(value, nodes, here / key);
  if (json.is_array())
    for (size_t i = 0; i < json.size() && i < 3; ++i) Nodes(json[i], nodes, here / i);
}

// Values that a reader of JSON may not expect, as text: some cannot be held as a value.
const std::vector<std::string>& OddValues() {
  static const auto& values = *new std::vector<std::string>{
      "null", "true", "-1", "0", "1", "18446744073709551615", "18446744073709551616", "9223372036854775807", "-9223372036854775808",
      "4294967296", "1e308", "1e999", "0.5", "\"\"", "\"\\u0000\"", "\"\\ud800\"", "\"x\"", "[]", "{}", "[0,0]", "[[1]]", "{\"a\":{}}",
      "\"" + std::string(100'000, 'a') + "\"", std::string(2'000, '[') + std::string(2'000, ']'),
      "[" + std::string(60'000, '1') + "]", "\"(a+)+$\"", "NaN", "\xff"};
  return values;
}

std::string WithText(const Seed& seed, std::string_view text) { return seed.rebuild ? seed.rebuild(text) : std::string(text); }

void JsonEdits(Maker& maker, const Seed& seed) {
  const std::string& text = seed.rebuild ? seed.text : seed.bytes;
  Json json = Json::parse(text);
  std::vector<Json::json_pointer> nodes;
  Nodes(json, nodes, Json::json_pointer());
  const std::string hole = "\"@hole@\"";
  for (size_t n = 0; n < std::min(nodes.size(), kMostNodes); ++n) {
    Json changed = json;
    changed[nodes[n]] = "@hole@";
    const std::string dump = changed.dump();
    const size_t at = dump.find(hole);
    // Two odd values at each place, all of them over the places; every place once left out and once doubled.
    for (size_t i = 0; i < 3; ++i) {
      const std::string& odd = OddValues()[(3 * n + i) % OddValues().size()];
      maker.Add(Join(seed.name, " ", nodes[n].to_string(), " = ", odd.substr(0, 24)),
                WithText(seed, dump.substr(0, at) + odd + dump.substr(at + hole.size())));
    }
    if (nodes[n].empty()) continue;
    Json without = json;
    Json& parent = without[nodes[n].parent_pointer()];
    if (parent.is_object()) {
      const std::string key = nodes[n].back();
      const std::string twice = Join("{\"", key, "\":null,", parent.dump().substr(1));
      parent.erase(key);
      maker.Add(Join(seed.name, " without ", nodes[n].to_string()), WithText(seed, without.dump()));
      Json marked = json;
      marked[nodes[n].parent_pointer()] = "@hole@";
      const std::string around = marked.dump();
      const size_t place = around.find(hole);
      maker.Add(Join(seed.name, " twice ", nodes[n].to_string()),
                WithText(seed, around.substr(0, place) + twice + around.substr(place + hole.size())));
    } else {
      parent.push_back(json[nodes[n]]);
      maker.Add(Join(seed.name, " repeats ", nodes[n].to_string()), WithText(seed, without.dump()));
    }
  }
}

std::vector<std::string> Tokens(std::string_view text) {
  std::vector<std::string> tokens;
  for (size_t i = 0; i < text.size();) {
    size_t end = i + 1;
    const auto word = [&](size_t at) { return at < text.size() && (isalnum(static_cast<unsigned char>(text[at])) != 0 || text[at] == '_'); };
    if (text.compare(i, 2, "{%") == 0 || text.compare(i, 2, "%}") == 0 || text.compare(i, 2, "{{") == 0 || text.compare(i, 2, "}}") == 0)
      end = i + 2;
    else if (word(i))
      while (word(end)) ++end;
    tokens.emplace_back(text.substr(i, end - i));
    i = end;
  }
  return tokens;
}

void TemplateEdits(Maker& maker, const Seed& seed) {
  static const std::vector<std::string> odd = {
      "{%", "%}", "{{", "}}", "{#", "-%}", "(", ")", "[", "]", "|", "~", "*", "**", "999999999", "-9223372036854775808", "range(1000000000)",
      "'a'*100000000", "none", "loop", "self", "messages", "super()", "for", "endfor", "if", "endif", "set", "macro", "recursive", "import",
      "'\xff'", "\"", "namespace()", "caller()", "1/0", "[[[[[[", "x.__class__", "| tojson", "| list", "strftime_now('%%%')", "%c"};
  const std::vector<std::string> tokens = Tokens(seed.bytes);
  for (size_t i = 0; i < kTokenEdits; ++i) {
    std::vector<std::string> edited = tokens;
    const size_t at = maker.Below(edited.size());
    switch (i % 4) {
      case 0: edited[at] = odd[maker.Below(odd.size())]; break;
      case 1: edited.erase(edited.begin() + static_cast<ptrdiff_t>(at)); break;
      case 2: edited.insert(edited.begin() + static_cast<ptrdiff_t>(at), odd[maker.Below(odd.size())]); break;
      default: std::swap(edited[at], edited[maker.Below(edited.size())]);
    }
    std::string text;
    for (const std::string& token : edited) text += token;
    maker.Add(Join(seed.name, " token edit ", i), std::move(text));
  }
}

}  // namespace

std::vector<Input> MakeInputs(const std::vector<Seed>& seeds, TextKind kind) {
  Maker maker;
  for (const Seed& seed : seeds) {
    maker.Add(seed.name, seed.bytes);
    Truncations(maker, seed);
    FieldValues(maker, seed);
    Flips(maker, seed);
    Splices(maker, seed);
    if (kind == TextKind::kJson) JsonEdits(maker, seed);
    if (kind == TextKind::kTemplate) TemplateEdits(maker, seed);
  }
  return std::move(maker.inputs);
}

}  // namespace refinery::fuzz
