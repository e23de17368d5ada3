// common/temporary_folder.h
//
// A new, empty folder that is removed with everything in it when the object goes.

#pragma once

#include <stdlib.h>

#include <filesystem>
#include <string>
#include <system_error>
#include <utility>

#include "common/status.h"

namespace refinery {

class TemporaryFolder {
 public:
  // <system's temporary folder>/<prefix>-<six letters>. FAILED_PRECONDITION when it cannot be made.
  static StatusOr<TemporaryFolder> Make(const std::string& prefix) {
    std::string path = (std::filesystem::temp_directory_path() / (prefix + "-XXXXXX")).string();
    if (::mkdtemp(path.data()) == nullptr) return FailedPrecondition("cannot make a folder like ", path);
    return TemporaryFolder(std::move(path));
  }
  TemporaryFolder(TemporaryFolder&& other) noexcept : path_(std::exchange(other.path_, {})) {}
  TemporaryFolder& operator=(TemporaryFolder&&) = delete;
  ~TemporaryFolder() {
    std::error_code error;
    if (!path_.empty()) std::filesystem::remove_all(path_, error);
  }

  const std::string& path() const { return path_; }

 private:
  explicit TemporaryFolder(std::string path) : path_(std::move(path)) {}
  std::string path_;
};

}  // namespace refinery
