// tests/fuzz/fuzz_target.h
//
// What a fuzz target consists of: libFuzzer's entry point, and the valid inputs that mutations start from. One source file a
// format; replay.cc runs the corpus through it without libFuzzer.

#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace refinery::fuzz {

// A number in a binary input that decides how the rest is read: a length, a count, an offset, a type.
struct Field {
  size_t offset = 0;
  size_t width = 0;   // bytes, little-endian
};

struct Seed {
  std::string name;
  std::string bytes;
  std::vector<Field> fields;       // binary formats
  // Text inside a binary input (safetensors' header): mutated by `text_mutations`, put back by `rebuild`.
  std::string text;
  std::function<std::string(std::string_view text)> rebuild;
};

enum class TextKind { kNone, kJson, kTemplate };

// Of the target that is linked in.
extern const char kFormat[];
extern const TextKind kTextKind;
std::vector<Seed> Seeds();

// How many inputs the target has read without an error so far.
extern size_t inputs_read;

// A file that holds the input while it is read; the same path each time, in a folder of this process.
const std::filesystem::path& InputFile(const uint8_t* data, size_t size, const char* name);
// That folder.
const std::filesystem::path& InputFolder();

struct Input {
  std::string name;    // says how it was made
  std::string bytes;
};
// Every seed, and mutations of it: the same list on every machine.
std::vector<Input> MakeInputs(const std::vector<Seed>& seeds, TextKind kind);

}  // namespace refinery::fuzz
