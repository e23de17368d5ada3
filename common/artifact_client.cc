#include "common/artifact_client.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <set>
#include <thread>

#include "common/files.h"
#include "common/grpc_status.h"
#include "common/limits.h"

namespace refinery {
namespace {

constexpr uint64_t kMaxManifestBytes = 64 << 20;
constexpr uint64_t kSlowestBytesPerSecond = 1 << 20;   // a transfer below this rate is cut and resumed

// Closes on scope exit.
struct Descriptor {
  explicit Descriptor(int number) : fd(number) {}
  ~Descriptor() {
    if (fd >= 0) ::close(fd);
  }
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  int fd;
};

void SetDeadline(grpc::ClientContext* context, std::chrono::milliseconds wait) {
  context->set_deadline(std::chrono::system_clock::now() + wait);
}

std::chrono::milliseconds TransferDeadline(uint64_t bytes) {
  return limits::kRpcDeadline * 2 + std::chrono::seconds(bytes / kSlowestBytesPerSecond);
}

bool IsRetryable(const Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kAborted:          // another writer of the same blob
    case absl::StatusCode::kAlreadyExists:    // ... who has finished
    case absl::StatusCode::kOutOfRange:       // the store lost a partial upload: ask for the offset again
    case absl::StatusCode::kUnknown:
      return true;
    default:
      return false;
  }
}

// Marks an error as one that the coordinator, or the way to it, gave: a disk that is full here is no reason to wait.
constexpr char kOfCall[] = "refinery/of_call";

Status OfCall(const grpc::Status& answer) {
  Status status = FromGrpc(answer);
  if (!status.ok()) status.SetPayload(kOfCall, absl::Cord());
  return status;
}

// Whether the coordinator may take the same call later although nothing changes here.
bool MayComeBack(const Status& status) {
  if (!status.GetPayload(kOfCall).has_value()) return false;
  return status.code() == absl::StatusCode::kUnavailable || status.code() == absl::StatusCode::kDeadlineExceeded ||
         status.code() == absl::StatusCode::kUnknown || status.code() == absl::StatusCode::kResourceExhausted;
}

Status WriteAll(int fd, std::string_view bytes, const std::filesystem::path& path) {
  while (!bytes.empty()) {
    ssize_t written = ::write(fd, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0 && (errno == ENOSPC || errno == EDQUOT))
      return ResourceExhausted("no space left to write ", path.string());
    if (written < 0) return Internal("cannot write ", path.string(), ": ", std::strerror(errno));
    bytes.remove_prefix(static_cast<size_t>(written));
  }
  return absl::OkStatus();
}

StatusOr<std::string> ReadAt(int fd, uint64_t offset, size_t size, const std::filesystem::path& path) {
  std::string bytes(size, '\0');
  size_t done = 0;
  while (done < size) {
    ssize_t got = ::pread(fd, bytes.data() + done, size - done, static_cast<off_t>(offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return DataLoss(path.string(), " became shorter while it was uploaded");
    done += static_cast<size_t>(got);
  }
  return bytes;
}

}  // namespace

ArtifactClient::ArtifactClient(const std::shared_ptr<grpc::Channel>& channel) : ArtifactClient(channel, Options()) {}

ArtifactClient::ArtifactClient(const std::shared_ptr<grpc::Channel>& channel, Options options)
    : options_(std::move(options)), stub_(v1::ArtifactService::NewStub(channel)) {}

Status ArtifactClient::CheckCancelled() const {
  if (options_.cancelled && options_.cancelled()) return Cancelled("the transfer was cancelled");
  return absl::OkStatus();
}

Status ArtifactClient::Retry(const std::function<Status()>& attempt, const std::function<uint64_t()>& progress) {
  uint64_t last_progress = progress();
  int failures = 0;
  std::chrono::milliseconds backoff = options_.initial_backoff;
  while (true) {
    RF_RETURN_IF_ERROR(CheckCancelled());
    Status status = attempt();
    if (status.ok()) return status;
    const bool patient = options_.patient && MayComeBack(status) && options_.patient(status);
    status.ErasePayload(kOfCall);
    if (!patient && !IsRetryable(status)) return status;
    uint64_t now = progress();
    if (now > last_progress) {
      failures = 0;
      backoff = options_.initial_backoff;
    }
    last_progress = now;
    if (!patient && ++failures >= options_.max_attempts)
      return Unavailable("gave up after ", failures, " tries: ", Message(status));
    RF_RETURN_IF_ERROR(Wait(backoff));
    backoff = std::min(backoff * 2, options_.max_backoff);
  }
}

Status ArtifactClient::Wait(std::chrono::milliseconds wait) const {
  constexpr std::chrono::milliseconds kPoll{50};
  for (auto waited = std::chrono::milliseconds(0); waited < wait; waited += kPoll) {
    RF_RETURN_IF_ERROR(CheckCancelled());
    std::this_thread::sleep_for(std::min(kPoll, wait - waited));
  }
  return absl::OkStatus();
}

StatusOr<v1::ArtifactRef> ArtifactClient::UploadFolder(const std::filesystem::path& folder, const std::string& name) {
  RF_ASSIGN_OR_RETURN(std::vector<FileEntry> files, ListFolder(folder));
  std::vector<Blob> blobs;
  for (FileEntry& file : files) {
    std::filesystem::path path = folder / file.path;
    blobs.push_back({.entry = std::move(file), .file = std::move(path)});
  }
  return UploadBlobs(std::move(blobs), name);
}

StatusOr<v1::ArtifactRef> ArtifactClient::UploadFile(const std::filesystem::path& file, const std::string& file_name,
                                                     const std::string& name) {
  RF_ASSIGN_OR_RETURN(std::string digest, DigestOfFile(file));
  std::error_code error;
  uint64_t size = std::filesystem::file_size(file, error);
  if (error) return NotFound("cannot read ", file.string(), ": ", error.message());
  std::vector<Blob> blobs;
  blobs.push_back({.entry = {.path = file_name, .digest = std::move(digest), .size = size}, .file = file});
  return UploadBlobs(std::move(blobs), name);
}

StatusOr<v1::ArtifactRef> ArtifactClient::UploadBlobs(std::vector<Blob> blobs, const std::string& name) {
  v1::ArtifactRef reference;
  std::vector<FileEntry> files;
  uint64_t size = 0;
  for (const Blob& blob : blobs) {
    files.push_back(blob.entry);
    size += blob.entry.size;
  }
  // The manifest goes last: where it is in the store, its files are too.
  Blob manifest;
  manifest.bytes = ManifestText(std::move(files));
  manifest.entry = {.path = "", .digest = DigestOf(manifest.bytes), .size = manifest.bytes.size()};
  reference.set_name(name);
  reference.set_digest(manifest.entry.digest);
  reference.set_size(size);
  blobs.push_back(std::move(manifest));

  RF_ASSIGN_OR_RETURN(std::vector<std::string> missing_list, FindMissing(blobs));
  std::set<std::string> missing(missing_list.begin(), missing_list.end());
  for (const Blob& blob : blobs) {
    if (missing.erase(blob.entry.digest) == 0) continue;
    RF_RETURN_IF_ERROR(UploadBlob(blob));
  }
  return reference;
}

StatusOr<std::vector<std::string>> ArtifactClient::FindMissing(const std::vector<Blob>& blobs) {
  constexpr size_t kBatch = 10'000;
  std::vector<std::string> missing;
  for (size_t begin = 0; begin < blobs.size(); begin += kBatch) {
    v1::FindMissingBlobsRequest request;
    for (size_t i = begin; i < std::min(begin + kBatch, blobs.size()); ++i) request.add_digests(blobs[i].entry.digest);
    v1::FindMissingBlobsResponse response;
    RF_RETURN_IF_ERROR(Retry(
        [&] {
          grpc::ClientContext context;
          SetDeadline(&context, limits::kRpcDeadline);
          return OfCall(stub_->FindMissingBlobs(&context, request, &response));
        },
        [] { return uint64_t{0}; }));
    missing.insert(missing.end(), response.missing().begin(), response.missing().end());
  }
  return missing;
}

Status ArtifactClient::UploadBlob(const Blob& blob) {
  uint64_t committed = 0;
  return Retry(
      [&]() -> Status {
        RF_ASSIGN_OR_RETURN(uint64_t offset, CommittedSize(blob));
        committed = std::max(committed, std::min(offset, blob.entry.size));
        if (offset > blob.entry.size) return absl::OkStatus();   // complete
        return WriteFrom(blob, offset);
      },
      [&] { return committed; });
}

// The size to go on from; one more than the blob's size when it is complete.
StatusOr<uint64_t> ArtifactClient::CommittedSize(const Blob& blob) {
  grpc::ClientContext context;
  SetDeadline(&context, limits::kRpcDeadline);
  v1::QueryWriteStatusRequest request;
  request.set_digest(blob.entry.digest);
  v1::QueryWriteStatusResponse response;
  Status status = OfCall(stub_->QueryWriteStatus(&context, request, &response));
  if (status.code() == absl::StatusCode::kNotFound) return uint64_t{0};
  RF_RETURN_IF_ERROR(status);
  if (response.complete()) return blob.entry.size + 1;
  if (response.committed_size() > blob.entry.size)
    return DataLoss("the store has more bytes of ", blob.entry.digest, " than it is long");
  return response.committed_size();
}

Status ArtifactClient::WriteFrom(const Blob& blob, uint64_t offset) {
  Descriptor file(blob.file.empty() ? -1 : ::open(blob.file.c_str(), O_RDONLY | O_CLOEXEC));
  if (!blob.file.empty() && file.fd < 0)
    return NotFound("cannot read ", blob.file.string(), ": ", std::strerror(errno));
  grpc::ClientContext context;
  SetDeadline(&context, TransferDeadline(blob.entry.size - offset));
  v1::WriteBlobResponse response;
  auto stream = stub_->WriteBlob(&context, &response);
  bool first = true;
  do {
    if (Status cancelled = CheckCancelled(); !cancelled.ok()) {
      context.TryCancel();
      (void)stream->Finish();
      return cancelled;
    }
    size_t size = std::min<uint64_t>(limits::kBlobChunkBytes, blob.entry.size - offset);
    v1::WriteBlobRequest request;
    if (first) {
      request.set_digest(blob.entry.digest);
      request.set_size(blob.entry.size);
    }
    first = false;
    request.set_offset(offset);
    if (blob.file.empty()) {
      request.set_data(blob.bytes.substr(offset, size));
    } else {
      auto bytes = ReadAt(file.fd, offset, size, blob.file);
      if (!bytes.ok()) {
        context.TryCancel();
        (void)stream->Finish();
        return bytes.status();
      }
      request.set_data(*std::move(bytes));
    }
    offset += size;
    request.set_finish(offset == blob.entry.size);
    if (!stream->Write(request)) break;     // the status says why
    if (options_.on_bytes) options_.on_bytes(size, 0);
  } while (offset < blob.entry.size);
  stream->WritesDone();
  Status status = OfCall(stream->Finish());
  if (status.code() == absl::StatusCode::kInvalidArgument)
    return DataLoss("the store refused ", blob.file.string(), ": ", Message(status),
                    " (was the file changed while it was uploaded?)");
  RF_RETURN_IF_ERROR(status);
  if (response.committed_size() != blob.entry.size)
    return Unavailable("the store took ", response.committed_size(), " of ", blob.entry.size, " bytes");
  return absl::OkStatus();
}

Status ArtifactClient::ReadFrom(const std::string& digest, uint64_t offset,
                                const std::function<Status(const std::string&)>& sink) {
  grpc::ClientContext context;
  SetDeadline(&context, TransferDeadline(uint64_t{1} << 30));
  v1::ReadBlobRequest request;
  request.set_digest(digest);
  request.set_offset(offset);
  auto stream = stub_->ReadBlob(&context, request);
  v1::ReadBlobResponse response;
  Status stopped;
  while (stopped.ok() && stream->Read(&response)) {
    stopped = CheckCancelled();
    if (stopped.ok()) stopped = sink(response.data());
    if (options_.on_bytes) options_.on_bytes(0, response.data().size());
  }
  if (!stopped.ok()) context.TryCancel();
  grpc::Status status = stream->Finish();
  return stopped.ok() ? OfCall(status) : stopped;
}

StatusOr<std::string> ArtifactClient::ReadBlobText(const std::string& digest, uint64_t max_bytes) {
  std::string text;
  RF_RETURN_IF_ERROR(Retry(
      [&] {
        return ReadFrom(digest, text.size(), [&](const std::string& bytes) {
          if (text.size() + bytes.size() > max_bytes)
            return ResourceExhausted("the blob ", digest, " is larger than ", max_bytes, " bytes");
          text += bytes;
          return absl::OkStatus();
        });
      },
      [&] { return text.size(); }));
  if (DigestOf(text) != digest) return DataLoss("what the store sent for ", digest, " does not have this digest");
  return text;
}

StatusOr<std::vector<FileEntry>> ArtifactClient::ReadManifest(const std::string& digest) {
  if (!IsDigest(digest)) return InvalidArgument("'", digest, "' is not a digest (sha256:<64 hex digits>)");
  RF_ASSIGN_OR_RETURN(std::string text, ReadBlobText(digest, kMaxManifestBytes));
  return ParseManifest(text);
}

StatusOr<std::string> ArtifactClient::ReadArtifactFile(const std::string& digest, const std::string& path,
                                                       uint64_t max_bytes) {
  RF_ASSIGN_OR_RETURN(std::vector<FileEntry> files, ReadManifest(digest));
  for (const FileEntry& file : files) {
    if (file.path == path) return ReadBlobText(file.digest, max_bytes);
  }
  return NotFound("the artifact ", digest, " has no file '", path, "'");
}

Status ArtifactClient::DownloadBlob(const FileEntry& entry, const std::filesystem::path& target) {
  Descriptor file(::open(target.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644));
  if (file.fd < 0) return Internal("cannot write ", target.string(), ": ", std::strerror(errno));
  auto size = [&] { return static_cast<uint64_t>(::lseek(file.fd, 0, SEEK_END)); };
  for (int round = 0; round < 2; ++round) {
    if (size() > entry.size && ::ftruncate(file.fd, 0) != 0) return Internal("cannot truncate ", target.string());
    if (size() < entry.size) {
      RF_RETURN_IF_ERROR(Retry(
          [&]() -> Status {
            RF_RETURN_IF_ERROR(ReadFrom(entry.digest, size(), [&](const std::string& bytes) {
              return WriteAll(file.fd, bytes, target);
            }));
            if (size() < entry.size) return Unavailable("the store sent ", size(), " of ", entry.size, " bytes");
            return absl::OkStatus();
          },
          size));
    }
    RF_ASSIGN_OR_RETURN(std::string digest, DigestOfFile(target));
    if (digest == entry.digest) {
      if (::fsync(file.fd) != 0) return Internal("cannot sync ", target.string(), ": ", std::strerror(errno));
      return absl::OkStatus();
    }
    // Bytes of an earlier, broken transfer may be the cause: once more from the start.
    if (::ftruncate(file.fd, 0) != 0) return Internal("cannot truncate ", target.string());
  }
  return DataLoss("what the store sent for ", entry.path, " does not have the digest ", entry.digest);
}

Status ArtifactClient::DownloadFolder(const std::string& digest, const std::filesystem::path& target) {
  std::error_code error;
  if (std::filesystem::exists(target, error)) return absl::OkStatus();
  RF_ASSIGN_OR_RETURN(std::vector<FileEntry> files, ReadManifest(digest));
  std::filesystem::path partial = target;
  partial += ".partial";
  RF_RETURN_IF_ERROR(CreateFolders(partial));
  std::set<std::filesystem::path> folders = {partial};
  for (const FileEntry& file : files) {
    std::filesystem::path path = partial / file.path;
    RF_RETURN_IF_ERROR(CreateFolders(path.parent_path()));
    folders.insert(path.parent_path());
    RF_RETURN_IF_ERROR(DownloadBlob(file, path));
  }
  for (const std::filesystem::path& folder : folders) RF_RETURN_IF_ERROR(SyncPath(folder));
  std::filesystem::rename(partial, target, error);
  if (error) return Internal("cannot move ", partial.string(), " to its place: ", error.message());
  return SyncPath(target.has_parent_path() ? target.parent_path() : ".");
}

StatusOr<std::string> FolderDigest(const std::filesystem::path& folder) {
  RF_ASSIGN_OR_RETURN(std::vector<FileEntry> files, ListFolder(folder));
  return DigestOf(ManifestText(std::move(files)));
}

StatusOr<std::string> FileArtifactDigest(const std::filesystem::path& file, const std::string& file_name) {
  RF_ASSIGN_OR_RETURN(std::string digest, DigestOfFile(file));
  std::error_code error;
  uint64_t size = std::filesystem::file_size(file, error);
  if (error) return NotFound("cannot read ", file.string(), ": ", error.message());
  return DigestOf(ManifestText({{.path = file_name, .digest = std::move(digest), .size = size}}));
}

}  // namespace refinery
