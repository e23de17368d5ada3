#include "worker/agent/artifact_cache.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>

#include "common/files.h"

namespace refinery::agent {
namespace {

constexpr size_t kPrefixSize = 7;   // "sha256:"

// An exclusive lock on a file, until scope exit.
class FileLock {
 public:
  ~FileLock() {
    if (fd_ >= 0) ::close(fd_);
  }
  FileLock() = default;
  FileLock(const FileLock&) = delete;
  FileLock& operator=(const FileLock&) = delete;

  Status Take(const std::filesystem::path& path, const std::function<bool()>& cancelled) {
    fd_ = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd_ < 0) return ResourceExhausted("cannot open the lock ", path.string(), ": ", std::strerror(errno));
    while (::flock(fd_, LOCK_EX | LOCK_NB) != 0) {
      if (errno != EWOULDBLOCK && errno != EINTR)
        return Internal("cannot lock ", path.string(), ": ", std::strerror(errno));
      if (cancelled && cancelled()) return Cancelled("cancelled while another worker downloads");
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
    return absl::OkStatus();
  }

 private:
  int fd_ = -1;
};

}  // namespace

ArtifactCache::ArtifactCache(std::filesystem::path folder) : folder_(std::move(folder)) {}

StatusOr<std::filesystem::path> ArtifactCache::Fetch(const std::string& digest, ArtifactClient& client,
                                                     const std::function<bool()>& cancelled) {
  if (!IsDigest(digest)) return InvalidArgument("'", digest, "' is not the digest of an artifact");
  std::string hex = digest.substr(kPrefixSize);
  std::filesystem::path target = folder_ / hex;
  std::error_code error;
  if (std::filesystem::is_directory(target, error)) return target;
  RF_RETURN_IF_ERROR(CreateFolders(folder_ / ".locks"));
  FileLock lock;
  RF_RETURN_IF_ERROR(lock.Take(folder_ / ".locks" / hex.substr(0, 2), cancelled));
  RF_RETURN_IF_ERROR(client.DownloadFolder(digest, target));
  return target;
}

void ArtifactCache::Adopt(const std::string& digest, const std::filesystem::path& folder) {
  std::filesystem::path target = folder_ / digest.substr(kPrefixSize);
  std::error_code error;
  if (std::filesystem::exists(target, error) || !CreateFolders(folder_).ok()) return;
  std::filesystem::rename(folder, target, error);   // fails when another attempt was faster, or across file systems
}

}  // namespace refinery::agent
