// common/artifact_client.h
//
// Moves artifacts (immutable folders) to and from the coordinator's content-addressed store through ArtifactService. Every
// transfer resumes: an upload at the offset that the store has, a download at the bytes that lie in the partial folder. What
// arrives is checked against its digest; a folder appears at its place whole or not at all.
//
// An artifact is the blobs of its files plus the blob of its manifest (common/digest.h); the manifest's digest is its name.
//
// Errors: UNAVAILABLE when the coordinator stays away for `max_attempts` tries without one new byte, DATA_LOSS for bytes that
// do not have their digest, NOT_FOUND, RESOURCE_EXHAUSTED on a full disk (here or there) or when the coordinator moves too many
// blobs already, CANCELLED when `cancelled` says so. `patient` waits instead for a coordinator that is away, full or busy.
// Threads: one call at a time per object; objects are cheap (they share the channel).

#pragma once

#include <chrono>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <grpcpp/channel.h>

#include "common/digest.h"
#include "common/status.h"
#include "refinery/v1/artifact.pb.h"
#include "refinery/v1/artifact_service.grpc.pb.h"

namespace refinery {

class ArtifactClient {
 public:
  struct Options {
    int max_attempts = 8;                              // tries in a row that bring nothing new
    std::chrono::milliseconds initial_backoff{100};    // doubled at each of them
    std::chrono::milliseconds max_backoff{5'000};
    // Asked when a try ended with this error of a coordinator that is away, full or busy: true = such tries do not count. May be empty.
    std::function<bool(const Status&)> patient;
    std::function<bool()> cancelled;                   // asked between chunks and while waiting; may be empty
    std::function<void(uint64_t sent, uint64_t received)> on_bytes;  // called after each chunk; may be empty
  };

  explicit ArtifactClient(const std::shared_ptr<grpc::Channel>& channel);
  ArtifactClient(const std::shared_ptr<grpc::Channel>& channel, Options options);

  // Uploads what the store lacks of every regular file below `folder`. `name` is the role in the returned reference.
  StatusOr<v1::ArtifactRef> UploadFolder(const std::filesystem::path& folder, const std::string& name);
  // The same for a folder that holds nothing but `file`, under the name `file_name`.
  StatusOr<v1::ArtifactRef> UploadFile(const std::filesystem::path& file, const std::string& file_name,
                                       const std::string& name);

  // Brings the artifact `digest` to the folder `target`, which must not exist or is taken as already complete. Partial
  // bytes lie in "<target>.partial" until then: two processes must not download to one target at a time.
  Status DownloadFolder(const std::string& digest, const std::filesystem::path& target);
  StatusOr<std::vector<FileEntry>> ReadManifest(const std::string& digest);
  // One file of the artifact as text. NOT_FOUND when the artifact has no such file.
  StatusOr<std::string> ReadArtifactFile(const std::string& digest, const std::string& path, uint64_t max_bytes);

 private:
  struct Blob {                       // from a file, or from `bytes` where `file` is empty
    FileEntry entry;
    std::filesystem::path file;
    std::string bytes;
  };

  StatusOr<v1::ArtifactRef> UploadBlobs(std::vector<Blob> blobs, const std::string& name);
  StatusOr<std::vector<std::string>> FindMissing(const std::vector<Blob>& blobs);
  Status UploadBlob(const Blob& blob);
  StatusOr<uint64_t> CommittedSize(const Blob& blob);
  Status WriteFrom(const Blob& blob, uint64_t offset);
  Status DownloadBlob(const FileEntry& entry, const std::filesystem::path& target);
  // Streams the blob from `offset`; `sink` returns an error to stop.
  Status ReadFrom(const std::string& digest, uint64_t offset, const std::function<Status(const std::string&)>& sink);
  StatusOr<std::string> ReadBlobText(const std::string& digest, uint64_t max_bytes);
  // Calls `attempt` until it ends well, fails for good, or `max_attempts` tries that count pass without `progress` growing.
  Status Retry(const std::function<Status()>& attempt, const std::function<uint64_t()>& progress);
  Status Wait(std::chrono::milliseconds wait) const;
  Status CheckCancelled() const;

  Options options_;
  std::unique_ptr<v1::ArtifactService::Stub> stub_;
};

// The name the folder would have, without uploading it.
StatusOr<std::string> FolderDigest(const std::filesystem::path& folder);
// The name of a folder that holds nothing but `file` as `file_name`.
StatusOr<std::string> FileArtifactDigest(const std::filesystem::path& file, const std::string& file_name);

}  // namespace refinery
