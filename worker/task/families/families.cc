#include "worker/task/families/family.h"

namespace refinery::families {

// One line per family, one file per line.
extern const Family kLlama, kMistral, kQwen2, kQwen3;

namespace {

constexpr const Family* kFamilies[] = {&kLlama, &kMistral, &kQwen2, &kQwen3};

const Family* Find(std::string_view Family::*name, std::string_view wanted) {
  for (const Family* family : kFamilies) {
    if (!wanted.empty() && family->*name == wanted) return family;
  }
  return nullptr;
}

std::string Known(std::string_view Family::*name) {
  std::string known;
  for (const Family* family : kFamilies) {
    if ((family->*name).empty()) continue;
    if (!known.empty()) known += ", ";
    known += family->*name;
  }
  return known;
}

}  // namespace

const Family* FindArchitecture(std::string_view architecture) { return Find(&Family::architecture, architecture); }
const Family* FindGguf(std::string_view architecture) { return Find(&Family::gguf, architecture); }
std::string KnownArchitectures() { return Known(&Family::architecture); }
std::string KnownGgufArchitectures() { return Known(&Family::gguf); }
std::span<const Family* const> AllFamilies() { return kFamilies; }

}  // namespace refinery::families
