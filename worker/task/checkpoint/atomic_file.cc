#include "worker/task/checkpoint/atomic_file.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstring>

#include "common/files.h"

namespace refinery::checkpoint {
namespace {

Status WriteError(const std::filesystem::path& path, int error) {
  std::string message = Join("cannot write ", path.string(), ": ", std::strerror(error));
  return error == ENOSPC || error == EDQUOT ? ResourceExhausted(message) : Unavailable(message);
}

std::filesystem::path FolderOf(const std::filesystem::path& path) {
  return path.has_parent_path() ? path.parent_path() : std::filesystem::path(".");
}

}  // namespace

StatusOr<std::unique_ptr<AtomicFile>> AtomicFile::Create(const std::filesystem::path& path, uint64_t size) {
  static std::atomic<uint64_t> counter{0};
  RF_RETURN_IF_ERROR(CreateFolders(FolderOf(path)));
  std::unique_ptr<AtomicFile> file(new AtomicFile);
  file->path_ = path;
  file->temporary_ = path;
  file->temporary_ += Join(".tmp", ::getpid(), "-", ++counter);
  file->fd_ = ::open(file->temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (file->fd_ < 0) return WriteError(path, errno);
  file->missing_ = size;
  return file;
}

AtomicFile::~AtomicFile() {
  if (fd_ < 0) return;
  ::close(fd_);
  ::unlink(temporary_.c_str());
}

Status AtomicFile::Append(std::string_view bytes) {
  if (bytes.size() > missing_) return Internal("more bytes than announced for ", path_.string());
  missing_ -= bytes.size();
  while (!bytes.empty()) {
    const ssize_t written = ::write(fd_, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) return WriteError(path_, errno);
    bytes.remove_prefix(static_cast<size_t>(written));
  }
  return absl::OkStatus();
}

Status AtomicFile::Finish() {
  if (missing_ != 0) return Internal(missing_, " bytes are missing in ", path_.string());
  if (::fsync(fd_) != 0 || ::rename(temporary_.c_str(), path_.c_str()) != 0) return WriteError(path_, errno);
  ::close(fd_);
  fd_ = -1;
  return SyncPath(FolderOf(path_));
}

}  // namespace refinery::checkpoint
