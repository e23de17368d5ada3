#include "server/store/blob_store.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

#include "absl/strings/str_format.h"
#include "common/files.h"
#include "server/store/failpoint.h"

namespace refinery::store {
namespace {

namespace fs = std::filesystem;

constexpr size_t kHexStart = 7;                      // after "sha256:"
// Never filled, so that the event log can still be written; on a small disk a sixteenth of it.
constexpr uint64_t kReservedBytes = uint64_t{64} << 20;
constexpr size_t kReadBytes = 1 << 20;

Status FromErrno(const fs::path& path, std::string_view doing) {
  const int error = errno;
  const std::string text = Join(path.string(), ": cannot ", doing, ": ", std::strerror(error));
  if (error == ENOSPC || error == EDQUOT) return ResourceExhausted(text, "; free space in the state folder");
  if (error == ENOENT) return NotFound(text);
  return Unavailable(text);
}

Status CheckDigest(const std::string& digest) {
  if (IsDigest(digest)) return absl::OkStatus();
  return InvalidArgument("'", digest.substr(0, 80), "' is not a digest; it must be sha256:<64 lower-case hex digits>");
}

uint64_t FileSize(const fs::path& path) {
  struct stat info {};
  return stat(path.c_str(), &info) == 0 ? static_cast<uint64_t>(info.st_size) : 0;
}

}  // namespace

fs::path BlobStore::BlobPath(const std::string& digest) const {
  return state_ / "cas" / digest.substr(kHexStart, 2) / digest.substr(kHexStart);
}

fs::path BlobStore::PartialPath(const std::string& digest, const std::string& scope) const {
  return state_ / "tmp" / Join(digest.substr(kHexStart), scope.empty() ? "" : ".", scope, ".partial");
}

StatusOr<DiskSpace> SpaceOf(const fs::path& path) {
  struct statvfs info {};
  if (statvfs(path.c_str(), &info) != 0) return FromErrno(path, "be examined");
  // As df counts: what only root may use is not there.
  return DiskSpace{.total_bytes = static_cast<uint64_t>(info.f_blocks - info.f_bfree + info.f_bavail) * info.f_frsize,
                   .free_bytes = static_cast<uint64_t>(info.f_bavail) * info.f_frsize};
}

StatusOr<std::unique_ptr<BlobStore>> BlobStore::Open(const fs::path& state, BlobStoreOptions options) {
  std::unique_ptr<BlobStore> store(new BlobStore(state, std::move(options)));
  RF_RETURN_IF_ERROR(CreateFolders(state / "cas"));
  RF_RETURN_IF_ERROR(CreateFolders(state / "tmp"));
  std::error_code error;
  for (auto it = fs::recursive_directory_iterator(state / "cas", error); it != fs::end(it); it.increment(error)) {
    if (error) break;
    if (!it->is_regular_file(error)) continue;
    store->total_bytes_ += it->file_size(error);
    ++store->total_blobs_;
  }
  if (error) return Unavailable((state / "cas").string(), ": cannot be listed: ", error.message());
  return store;
}

bool BlobStore::Contains(const std::string& digest) const { return SizeOf(digest).ok(); }

bool BlobStore::IsStored(const std::string& digest) const {
  struct stat info {};
  return IsDigest(digest) && stat(BlobPath(digest).c_str(), &info) == 0;
}

StatusOr<uint64_t> BlobStore::SizeOf(const std::string& digest) const {
  RF_RETURN_IF_ERROR(CheckDigest(digest));
  Claim(digest);
  struct stat info {};
  if (stat(BlobPath(digest).c_str(), &info) != 0) return NotFound("there is no blob ", digest);
  return static_cast<uint64_t>(info.st_size);
}

uint64_t BlobStore::PartialSize(const std::string& digest, const std::string& scope) const {
  return IsDigest(digest) ? FileSize(PartialPath(digest, scope)) : 0;
}

std::string DiskMark::Words() const {
  return absl::StrFormat("more than %.3g %% used and less than %.3g GiB free", 100 * used_above,
                         static_cast<double>(free_below) / (1 << 30));
}

Status BlobStore::CheckSpace(uint64_t bytes) const {
  RF_ASSIGN_OR_RETURN(const DiskSpace space, Space());
  if (options_.read_only.IsPassed(space)) {
    return ResourceExhausted("the disk of the state folder ", state_.string(), " is ", static_cast<int>(100 * space.used()),
                             " % full; with ", options_.read_only.Words(), " nothing more is taken in: free space there");
  }
  const uint64_t reserved = std::min(kReservedBytes, space.total_bytes / 16);
  if (space.free_bytes >= reserved && space.free_bytes - reserved >= bytes) return absl::OkStatus();
  return ResourceExhausted("the coordinator's disk has ", space.free_bytes, " bytes left, too few for a blob of ", bytes,
                           " bytes; free space below ", state_.string());
}

void BlobStore::Claim(const std::string& digest) const {
  std::lock_guard lock(candidates_mutex_);
  candidates_.erase(digest);
}

StatusOr<BlobStore::Swept> BlobStore::Sweep(const std::function<bool(const std::string& digest)>& is_live,
                                            std::chrono::milliseconds now, std::chrono::milliseconds grace) {
  Swept swept{.deleted = SweepPartials(grace)};
  std::error_code error;
  for (fs::recursive_directory_iterator it(state_ / "cas", error), end; !error && it != end; it.increment(error)) {
    if (!it->is_regular_file(error)) continue;
    const std::string digest = "sha256:" + it->path().filename().string();
    const bool live = is_live(digest);
    std::lock_guard lock(candidates_mutex_);
    if (live) {
      candidates_.erase(digest);
      continue;
    }
    const auto since = candidates_.try_emplace(digest, now).first;
    if (now - since->second < grace) {
      ++swept.candidates;
      continue;
    }
    const uint64_t size = FileSize(it->path());
    Failpoint("gc_before_unlink");
    if (unlink(it->path().c_str()) != 0) return FromErrno(it->path(), "be removed");
    candidates_.erase(since);
    total_bytes_ -= size;
    --total_blobs_;
    ++swept.deleted;
    swept.deleted_bytes += size;
  }
  if (error) return Unavailable((state_ / "cas").string(), ": cannot be listed: ", error.message());
  return swept;
}

uint64_t BlobStore::SweepPartials(std::chrono::milliseconds grace) {
  uint64_t deleted = 0;
  std::error_code error;
  for (fs::directory_iterator it(state_ / "tmp", error), end; !error && it != end; it.increment(error)) {
    const auto age = fs::file_time_type::clock::now() - it->last_write_time(error);
    if (!error && age > grace && unlink(it->path().c_str()) == 0) ++deleted;
  }
  return deleted;
}

std::shared_ptr<BlobStore::Ticket> BlobStore::TicketOf(const std::string& partial) {
  std::lock_guard lock(tickets_mutex_);
  std::erase_if(tickets_, [](const auto& entry) { return entry.second.expired(); });
  std::shared_ptr<Ticket> ticket = tickets_[partial].lock();
  if (!ticket) tickets_[partial] = ticket = std::make_shared<Ticket>();
  return ticket;
}

StatusOr<std::unique_ptr<BlobStore::Upload>> BlobStore::StartUpload(const std::string& digest, uint64_t size,
                                                                    uint64_t offset, const std::string& scope) {
  RF_RETURN_IF_ERROR(CheckDigest(digest));
  const fs::path path = PartialPath(digest, scope);
  std::unique_ptr<Upload> upload(new Upload(this, digest, path, size));
  upload->ticket_ = TicketOf(path.filename().string());
  std::lock_guard lock(upload->ticket_->mutex);
  uint64_t present = FileSize(path);
  if (present > size) {  // left by an upload that announced another size: its bytes cannot be right
    if (unlink(path.c_str()) != 0) return FromErrno(path, "be removed");
    present = 0;
  }
  if (offset != present) {
    return OutOfRange("the upload of ", digest, " must go on at offset ", present, ", not ", offset,
                      "; ask QueryWriteStatus first");
  }
  RF_RETURN_IF_ERROR(CheckSpace(size - present));
  upload->fd_ = open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (upload->fd_ < 0) return FromErrno(path, "be opened");
  std::string buffer(std::min<uint64_t>(kReadBytes, std::max<uint64_t>(present, 1)), '\0');
  while (upload->committed_ < present) {
    const ssize_t n = pread(upload->fd_, buffer.data(), buffer.size(), static_cast<off_t>(upload->committed_));
    if (n <= 0) return FromErrno(path, "be read");
    upload->hash_.Update({buffer.data(), static_cast<size_t>(n)});
    upload->committed_ += n;
  }
  upload->resumed_ = present > 0;
  upload->number_ = ++upload->ticket_->newest;
  return upload;
}

BlobStore::Upload::~Upload() {
  if (fd_ >= 0) close(fd_);
}

Status BlobStore::Upload::Write(uint64_t offset, std::string_view bytes) {
  std::lock_guard lock(ticket_->mutex);
  if (ticket_->newest != number_) return Aborted("another upload of ", digest_, " took over; ask QueryWriteStatus");
  if (offset != committed_) {
    return OutOfRange("the next bytes of ", digest_, " must start at offset ", committed_, ", not ", offset);
  }
  if (bytes.size() > size_ - committed_) {
    return OutOfRange(digest_, " was announced with ", size_, " bytes and more are coming");
  }
  while (!bytes.empty()) {
    const ssize_t n = pwrite(fd_, bytes.data(), bytes.size(), static_cast<off_t>(committed_));
    if (n < 0) {
      if (errno == EINTR) continue;
      return FromErrno(path_, "be written");
    }
    hash_.Update(bytes.substr(0, n));
    committed_ += n;
    bytes.remove_prefix(n);
    Failpoint("blob_write");
  }
  return absl::OkStatus();
}

Status BlobStore::Upload::Finish() {
  std::lock_guard lock(ticket_->mutex);
  if (ticket_->newest != number_) return Aborted("another upload of ", digest_, " took over; ask QueryWriteStatus");
  if (committed_ != size_) {
    return OutOfRange("the upload of ", digest_, " ended after ", committed_, " of ", size_, " bytes");
  }
  const std::string actual = hash_.Finish();
  if (actual != digest_) {
    unlink(path_.c_str());
    if (resumed_) {  // the part that was here from before may have been torn by a power loss: not the sender's fault
      return Aborted("the resumed upload of ", digest_, " has the digest ", actual, "; upload it again from the start");
    }
    return InvalidArgument("the bytes sent as ", digest_, " have the digest ", actual, "; the upload was dropped");
  }
  if (fsync(fd_) != 0) return FromErrno(path_, "be synced");
  return store_->Publish(path_, digest_, size_);
}

Status BlobStore::Publish(const fs::path& from, const std::string& digest, uint64_t size) {
  const fs::path to = BlobPath(digest);
  const bool known = Contains(digest);
  const bool new_folder = !fs::exists(to.parent_path());
  RF_RETURN_IF_ERROR(CreateFolders(to.parent_path()));
  chmod(from.c_str(), 0444);
  Failpoint("blob_before_rename");
  if (rename(from.c_str(), to.c_str()) != 0) return FromErrno(from, "be renamed");
  Failpoint("blob_after_rename");
  RF_RETURN_IF_ERROR(SyncPath(to.parent_path()));
  if (new_folder) RF_RETURN_IF_ERROR(SyncPath(state_ / "cas"));
  if (!known) {
    total_bytes_ += size;
    ++total_blobs_;
  }
  return absl::OkStatus();
}

void BlobStore::Quarantine(const std::string& digest, uint64_t size) {
  std::error_code error;
  fs::create_directories(state_ / "damaged", error);
  fs::rename(BlobPath(digest), state_ / "damaged" / digest.substr(kHexStart), error);
  if (error) return;
  total_bytes_ -= size;
  --total_blobs_;
}

StatusOr<std::string> BlobStore::Put(std::string_view bytes) {
  const std::string digest = DigestOf(bytes);
  if (Contains(digest)) return digest;
  Status status;
  for (int tries = 0; tries < 2; ++tries) {  // the second time from the start, should an old partial file be torn
    RF_ASSIGN_OR_RETURN(auto upload, StartUpload(digest, bytes.size(), PartialSize(digest)));
    RF_RETURN_IF_ERROR(upload->Write(upload->committed(), bytes.substr(upload->committed())));
    status = upload->Finish();
    if (status.ok()) return digest;
  }
  return status;
}

StatusOr<std::unique_ptr<BlobStore::Reader>> BlobStore::OpenReader(const std::string& digest, uint64_t offset) {
  RF_RETURN_IF_ERROR(CheckDigest(digest));
  Claim(digest);
  const fs::path path = BlobPath(digest);
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return errno == ENOENT ? NotFound("there is no blob ", digest) : FromErrno(path, "be opened");
  struct stat info {};
  fstat(fd, &info);
  std::unique_ptr<Reader> reader(new Reader(this, digest, fd, static_cast<uint64_t>(info.st_size)));
  if (offset > reader->size_) {
    return OutOfRange(digest, " has ", reader->size_, " bytes; it cannot be read from ", offset);
  }
  while (reader->position_ < offset) {
    RF_RETURN_IF_ERROR(reader->Read(std::min<uint64_t>(kReadBytes, offset - reader->position_)).status());
  }
  return reader;
}

BlobStore::Reader::~Reader() { close(fd_); }

StatusOr<std::string> BlobStore::Reader::Read(size_t max_bytes) {
  std::string bytes(std::min<uint64_t>(max_bytes, size_ - position_), '\0');
  size_t have = 0;
  while (have < bytes.size()) {
    const ssize_t n = pread(fd_, bytes.data() + have, bytes.size() - have, static_cast<off_t>(position_ + have));
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return FromErrno(store_->BlobPath(digest_), "be read");
    have += n;
  }
  hash_.Update(bytes);
  position_ += bytes.size();
  // The verdict comes with the last bytes: whoever has read the whole blob has read a good one.
  if (position_ == size_ && !finished_) {
    finished_ = true;
    if (hash_.Finish() != digest_) {
      store_->Quarantine(digest_, size_);
      return DataLoss("the stored bytes of ", digest_, " are damaged; the blob was set aside and must be made again");
    }
  }
  return bytes;
}

StatusOr<std::string> BlobStore::Get(const std::string& digest, uint64_t max_bytes) {
  RF_ASSIGN_OR_RETURN(auto reader, OpenReader(digest, 0));
  if (reader->size() > max_bytes) {
    return ResourceExhausted(digest, " has ", reader->size(), " bytes, more than the ", max_bytes, " that fit here");
  }
  return reader->Read(reader->size());
}

}  // namespace refinery::store
