// tests/server/store/temp_folder.h
//
// A folder of its own for a test, removed at the end.

#pragma once

#include <cstdlib>
#include <filesystem>
#include <string>

#include "common/status.h"

namespace refinery::testing {

class TempFolder {
 public:
  TempFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "refinery_test.XXXXXX").string();
    RF_CHECK(mkdtemp(name.data()) != nullptr);
    path_ = name;
  }
  ~TempFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  TempFolder(const TempFolder&) = delete;
  TempFolder& operator=(const TempFolder&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

}  // namespace refinery::testing
