#include "server/store/backup.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <vector>

#include <nlohmann/json.hpp>

#include "common/digest.h"
#include "common/files.h"
#include "server/store/event_log.h"
#include "server/store/snapshots.h"

namespace refinery::store {
namespace {

namespace fs = std::filesystem;

constexpr size_t kCopyBytes = 1 << 20;
constexpr char kInfoFile[] = "backup.json";

Status FromErrno(const fs::path& path, std::string_view doing) {
  const int error = errno;
  const std::string text = Join(path.string(), ": cannot ", doing, ": ", std::strerror(error));
  if (error == ENOSPC || error == EDQUOT) return ResourceExhausted(text);
  if (error == ENOENT) return NotFound(text);
  return Unavailable(text);
}

class Fd {
 public:
  explicit Fd(int fd) : fd_(fd) {}
  ~Fd() {
    if (fd_ >= 0) close(fd_);
  }
  Fd(const Fd&) = delete;
  Fd& operator=(const Fd&) = delete;
  operator int() const { return fd_; }

 private:
  const int fd_;
};

// Copies one file and syncs it; returns the digest of the bytes that were copied.
StatusOr<std::string> CopyFile(const fs::path& from, const fs::path& to, mode_t mode, uint64_t* bytes) {
  const Fd in(open(from.c_str(), O_RDONLY | O_CLOEXEC));
  if (in < 0) return FromErrno(from, "be opened");
  const Fd out(open(to.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
  if (out < 0) return FromErrno(to, "be created");
  std::vector<char> buffer(kCopyBytes);
  Sha256 hash;
  for (;;) {
    const ssize_t got = read(in, buffer.data(), buffer.size());
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) return FromErrno(from, "be read");
    if (got == 0) break;
    hash.Update({buffer.data(), static_cast<size_t>(got)});
    for (ssize_t done = 0; done < got;) {
      const ssize_t put = write(out, buffer.data() + done, static_cast<size_t>(got - done));
      if (put < 0 && errno == EINTR) continue;
      if (put < 0) return FromErrno(to, "be written");
      done += put;
    }
    *bytes += static_cast<uint64_t>(got);
  }
  if (fsync(out) != 0) return FromErrno(to, "be synced");
  fchmod(out, mode);
  return hash.Finish();
}

// Files below `folder`, relative to it; none when there is no such folder.
std::vector<fs::path> FilesBelow(const fs::path& folder) {
  std::vector<fs::path> files;
  std::error_code error;
  for (fs::recursive_directory_iterator it(folder, error), end; !error && it != end; it.increment(error)) {
    if (it->is_regular_file(error)) files.push_back(fs::relative(it->path(), folder));
  }
  return files;
}

Status NeedEmpty(const fs::path& folder) {
  std::error_code error;
  if (!fs::exists(folder, error) || fs::is_empty(folder, error)) return CreateFolders(folder);
  return AlreadyExists(folder.string(), " is not empty; name a folder that does not exist yet");
}

// Blobs and their digests' check. A blob that vanished meanwhile was collected: nothing refers to it.
Status CopyBlobs(const fs::path& from, const fs::path& to, BackupInfo* info) {
  for (const fs::path& file : FilesBelow(from / "cas")) {
    RF_RETURN_IF_ERROR(CreateFolders((to / "cas" / file).parent_path()));
    const StatusOr<std::string> digest = CopyFile(from / "cas" / file, to / "cas" / file, 0444, &info->bytes);
    if (absl::IsNotFound(digest.status())) continue;
    if (!digest.ok()) return digest.status();
    if (*digest != "sha256:" + file.filename().string()) {
      return DataLoss((from / "cas" / file).string(), ": its bytes are damaged; remove it and let its task run again");
    }
    ++info->blobs;
  }
  return absl::OkStatus();
}

// Files that may come and go meanwhile.
Status CopyFolder(const fs::path& from, const fs::path& to) {
  for (const fs::path& file : FilesBelow(from)) {
    if (file.string().find(".tmp") != std::string::npos) continue;  // being written
    RF_RETURN_IF_ERROR(CreateFolders((to / file).parent_path()));
    uint64_t ignored = 0;
    const Status status = CopyFile(from / file, to / file, 0644, &ignored).status();
    if (!status.ok() && !absl::IsNotFound(status)) return status;
  }
  return absl::OkStatus();
}

// A folder that was empty and could not be filled is empty again, so that the next try finds it so.
StatusOr<BackupInfo> OrEmptied(StatusOr<BackupInfo> info, const fs::path& folder) {
  if (info.ok()) return info;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(folder, error)) {
    std::error_code ignored;
    fs::remove_all(entry.path(), ignored);
  }
  return info;
}

StatusOr<BackupInfo> FillBackup(const fs::path& state, const fs::path& target) {
  BackupInfo info;
  // A compacted log needs a snapshot that is not newer than itself: those from before the copy, or from after it should the
  // log have been compacted in between.
  RF_RETURN_IF_ERROR(CopyFolder(state / "snapshots", target / "snapshots"));
  RF_ASSIGN_OR_RETURN(info.last_seq, CopyEventLog(state, target / "refinery.db"));
  RF_RETURN_IF_ERROR(CopyFolder(state / "snapshots", target / "snapshots"));
  RF_RETURN_IF_ERROR(CopyFolder(state / "logs", target / "logs"));
  RF_RETURN_IF_ERROR(SyncPath(target / "refinery.db"));
  RF_RETURN_IF_ERROR(CopyBlobs(state, target, &info));
  const nlohmann::json json = {{"last_seq", info.last_seq}, {"blobs", info.blobs}, {"bytes", info.bytes}};
  RF_RETURN_IF_ERROR(WriteFileAtomically(target / kInfoFile, json.dump() + "\n"));
  return info;
}

StatusOr<BackupInfo> FillState(const fs::path& backup, const fs::path& state, uint64_t blobs) {
  BackupInfo info;
  RF_RETURN_IF_ERROR(CopyBlobs(backup, state, &info));
  if (info.blobs != blobs) {
    return FailedPrecondition(backup.string(), " has ", info.blobs, " blobs; its ", kInfoFile, " names ", blobs);
  }
  for (const char* folder : {"snapshots", "logs"}) RF_RETURN_IF_ERROR(CopyFolder(backup / folder, state / folder));
  RF_ASSIGN_OR_RETURN(info.last_seq, CopyEventLog(backup, state / "refinery.db.restoring"));
  RF_RETURN_IF_ERROR(SyncPath(state / "refinery.db.restoring"));
  std::error_code error;
  fs::rename(state / "refinery.db.restoring", state / "refinery.db", error);
  if (error) return Unavailable((state / "refinery.db").string(), ": cannot be named: ", error.message());
  RF_RETURN_IF_ERROR(SyncPath(state));
  return info;
}

}  // namespace

StatusOr<BackupInfo> Backup(const fs::path& state, const fs::path& target) {
  std::error_code error;
  if (!fs::exists(state / "refinery.db", error)) return FailedPrecondition(state.string(), " is no state folder");
  RF_RETURN_IF_ERROR(NeedEmpty(target));
  return OrEmptied(FillBackup(state, target), target);
}

StatusOr<BackupInfo> Restore(const fs::path& backup, const fs::path& state) {
  const StatusOr<std::string> text = ReadFile(backup / kInfoFile);
  if (!text.ok()) {
    return FailedPrecondition(backup.string(), " is no complete backup: ", Message(text.status()));
  }
  const nlohmann::json json = nlohmann::json::parse(*text, nullptr, false);
  if (!json.is_object() || !json.contains("blobs") || !json["blobs"].is_number_unsigned()) {
    return FailedPrecondition((backup / kInfoFile).string(), " is not what a backup writes");
  }
  RF_RETURN_IF_ERROR(NeedEmpty(state));
  RF_RETURN_IF_ERROR(CheckEventLog(backup));
  return OrEmptied(FillState(backup, state, json["blobs"].get<uint64_t>()), state);
}

}  // namespace refinery::store
