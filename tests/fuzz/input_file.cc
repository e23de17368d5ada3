#include <stdlib.h>

#include <cstdio>

#include "tests/fuzz/fuzz_target.h"

namespace refinery::fuzz {

size_t inputs_read = 0;

const std::filesystem::path& InputFolder() {
  static const auto& folder = *new std::filesystem::path([] {
    const bool has_memory = std::filesystem::is_directory("/dev/shm");
    std::string name = std::string(has_memory ? "/dev/shm" : "/tmp") + "/refinery-fuzz-XXXXXX";
    if (::mkdtemp(name.data()) == nullptr) std::abort();
    return name;
  }());
  return folder;
}

const std::filesystem::path& InputFile(const uint8_t* data, size_t size, const char* name) {
  static auto& path = *new std::filesystem::path;
  path = InputFolder() / name;
  FILE* file = std::fopen(path.c_str(), "wb");
  if (file == nullptr || (size > 0 && std::fwrite(data, 1, size, file) != size)) std::abort();
  std::fclose(file);
  return path;
}

}  // namespace refinery::fuzz
