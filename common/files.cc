#include "common/files.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>

namespace refinery {
namespace {

Status IoError(std::string_view what, const std::filesystem::path& path, int error) {
  std::string message = Join(what, " ", path.string(), ": ", std::strerror(error));
  if (error == ENOENT) return NotFound(message);
  if (error == ENOSPC || error == EDQUOT) return ResourceExhausted(message);
  return Unavailable(message);
}

}  // namespace

StatusOr<std::string> ReadFile(const std::filesystem::path& path, uint64_t max_bytes) {
  std::error_code error;
  if (!std::filesystem::is_regular_file(path, error)) return NotFound("no such file: ", path.string());
  uint64_t size = std::filesystem::file_size(path, error);
  if (size > max_bytes)
    return ResourceExhausted(path.string(), " has ", size, " bytes; at most ", max_bytes, " are read");
  std::ifstream file(path, std::ios::binary);
  if (!file) return NotFound("cannot read ", path.string(), ": ", std::strerror(errno));
  std::string bytes(size, '\0');
  file.read(bytes.data(), static_cast<std::streamsize>(size));
  if (static_cast<uint64_t>(file.gcount()) != size) return DataLoss(path.string(), " ended early");
  return bytes;
}

Status CreateFolders(const std::filesystem::path& path) {
  std::error_code error;
  std::filesystem::create_directories(path, error);
  if (error) return Unavailable("cannot create folder ", path.string(), ": ", error.message());
  return absl::OkStatus();
}

Status SyncPath(const std::filesystem::path& path) {
  int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return IoError("cannot open", path, errno);
  int result = ::fsync(fd);
  int error = errno;
  ::close(fd);
  if (result != 0) return IoError("cannot sync", path, error);
  return absl::OkStatus();
}

Status WriteFileAtomically(const std::filesystem::path& path, std::string_view bytes) {
  std::filesystem::path folder = path.has_parent_path() ? path.parent_path() : ".";
  RF_RETURN_IF_ERROR(CreateFolders(folder));
  std::filesystem::path temporary = path;
  temporary += Join(".tmp", ::getpid());
  int fd = ::open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (fd < 0) return IoError("cannot write", temporary, errno);
  while (!bytes.empty()) {
    ssize_t written = ::write(fd, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0) {
      int error = errno;
      ::close(fd);
      ::unlink(temporary.c_str());
      return IoError("cannot write", path, error);
    }
    bytes.remove_prefix(static_cast<size_t>(written));
  }
  bool synced = ::fsync(fd) == 0;
  int error = errno;
  ::close(fd);
  if (!synced || ::rename(temporary.c_str(), path.c_str()) != 0) {
    if (synced) error = errno;
    ::unlink(temporary.c_str());
    return IoError("cannot write", path, error);
  }
  return SyncPath(folder);
}

}  // namespace refinery
