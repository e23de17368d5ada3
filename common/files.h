// common/files.h
//
// Reading and writing whole files. Writes are atomic: a temporary file beside the target, fsync, rename, fsync of the folder.

#pragma once

#include <filesystem>
#include <string>
#include <string_view>

#include "common/status.h"

namespace refinery {

// NOT_FOUND; RESOURCE_EXHAUSTED when the file is larger than `max_bytes`.
StatusOr<std::string> ReadFile(const std::filesystem::path& path, uint64_t max_bytes = uint64_t{1} << 32);
// RESOURCE_EXHAUSTED on a full disk, UNAVAILABLE otherwise. Creates missing folders.
Status WriteFileAtomically(const std::filesystem::path& path, std::string_view bytes);
// fsync of a file or folder.
Status SyncPath(const std::filesystem::path& path);
Status CreateFolders(const std::filesystem::path& path);

}  // namespace refinery
