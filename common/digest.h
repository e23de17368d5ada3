// common/digest.h
//
// SHA-256 names for bytes, files and folders: "sha256:" + 64 lower-case hex digits. Everything content-addressed uses them.

#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"

namespace refinery {

// Hashes a stream. Not copyable; one thread.
class Sha256 {
 public:
  Sha256();
  ~Sha256();
  Sha256(const Sha256&) = delete;
  Sha256& operator=(const Sha256&) = delete;

  void Update(std::string_view bytes);
  // "sha256:<hex>"; the object must not be used afterwards.
  std::string Finish();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

std::string DigestOf(std::string_view bytes);
// NOT_FOUND, or UNAVAILABLE when reading fails half-way.
StatusOr<std::string> DigestOfFile(const std::filesystem::path& path);
// Whether `digest` has the form "sha256:<64 hex>".
bool IsDigest(std::string_view digest);

// The seed of one place in a job: the first eight bytes (big-endian) of SHA-256("<seed>/<path>"). Never from time.
uint64_t DeriveSeed(uint64_t seed, std::string_view path);

// One file of a folder artifact; `path` is relative with '/' between parts.
struct FileEntry {
  std::string path;
  std::string digest;
  uint64_t size = 0;
};

// The canonical text of a folder artifact, one line per file sorted by path: "<digest> <size> <path>\n" (docs/formats.md).
// Its digest is the artifact's name.
std::string ManifestText(std::vector<FileEntry> files);
// INVALID_ARGUMENT for text that ManifestText would not have written (also for absolute paths and "..").
StatusOr<std::vector<FileEntry>> ParseManifest(std::string_view text);
// Every regular file below `folder`, hashed. FAILED_PRECONDITION for links and special files.
StatusOr<std::vector<FileEntry>> ListFolder(const std::filesystem::path& folder);

}  // namespace refinery
