#include "server/store/artifacts.h"

namespace refinery::store {
namespace {

constexpr uint64_t kMaxManifestBytes = 64 << 20;

}  // namespace

StatusOr<v1::ArtifactRef> PutArtifact(BlobStore& blobs, const std::string& name,
                                      const std::map<std::string, std::string>& files) {
  std::vector<FileEntry> entries;
  v1::ArtifactRef ref;
  ref.set_name(name);
  for (const auto& [path, bytes] : files) {
    RF_ASSIGN_OR_RETURN(std::string digest, blobs.Put(bytes));
    entries.push_back({.path = path, .digest = std::move(digest), .size = bytes.size()});
    ref.set_size(ref.size() + bytes.size());
  }
  RF_ASSIGN_OR_RETURN(std::string digest, blobs.Put(ManifestText(std::move(entries))));
  ref.set_digest(std::move(digest));
  return ref;
}

StatusOr<std::vector<FileEntry>> FilesOf(BlobStore& blobs, const std::string& digest) {
  RF_ASSIGN_OR_RETURN(std::string text, blobs.Get(digest, kMaxManifestBytes));
  StatusOr<std::vector<FileEntry>> entries = ParseManifest(text);
  if (!entries.ok()) return DataLoss(digest, " is not the manifest of an artifact: ", Message(entries.status()));
  return entries;
}

StatusOr<uint64_t> CheckComplete(BlobStore& blobs, const std::string& digest) {
  StatusOr<std::vector<FileEntry>> entries = FilesOf(blobs, digest);
  if (absl::IsNotFound(entries.status())) {
    return FailedPrecondition("artifact ", digest, " was not uploaded; upload its manifest and files first");
  }
  if (!entries.ok()) return entries.status();
  uint64_t size = 0;
  for (const FileEntry& entry : *entries) {
    const StatusOr<uint64_t> stored = blobs.SizeOf(entry.digest);
    if (!stored.ok()) {
      return FailedPrecondition("file ", entry.path, " (", entry.digest, ") of artifact ", digest,
                                " is missing; upload it first");
    }
    if (*stored != entry.size) {
      return FailedPrecondition("file ", entry.path, " of artifact ", digest, " has ", *stored, " bytes; its manifest says ",
                                entry.size);
    }
    size += entry.size;
  }
  return size;
}

StatusOr<std::string> ReadArtifactFile(BlobStore& blobs, const std::string& digest, const std::string& path) {
  RF_ASSIGN_OR_RETURN(std::vector<FileEntry> entries, FilesOf(blobs, digest));
  for (const FileEntry& entry : entries) {
    if (entry.path == path) return blobs.Get(entry.digest);
  }
  return NotFound("artifact ", digest, " has no file ", path);
}

}  // namespace refinery::store
