#include "worker/agent/artifact_cache.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <thread>

#include "common/files.h"

namespace refinery::agent {
namespace {

constexpr char kPrefix[] = "sha256:";
constexpr size_t kPrefixSize = sizeof(kPrefix) - 1;
constexpr std::chrono::seconds kScanEvery{30};

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
  if (std::filesystem::is_directory(target, error)) {
    Used(hex);
    return target;
  }
  RF_RETURN_IF_ERROR(CreateFolders(folder_ / ".locks"));
  FileLock lock;
  RF_RETURN_IF_ERROR(lock.Take(folder_ / ".locks" / hex.substr(0, 2), cancelled));
  RF_RETURN_IF_ERROR(client.DownloadFolder(digest, target));
  Used(hex);
  return target;
}

void ArtifactCache::Adopt(const std::string& digest, const std::filesystem::path& folder) {
  std::filesystem::path target = folder_ / digest.substr(kPrefixSize);
  std::error_code error;
  if (std::filesystem::exists(target, error) || !CreateFolders(folder_).ok()) return;
  std::filesystem::rename(folder, target, error);   // fails when another attempt was faster, or across file systems
  if (!error) Used(digest.substr(kPrefixSize));
}

void ArtifactCache::Used(const std::string& hex) {
  std::lock_guard<std::mutex> lock(mutex_);
  used_[hex] = Time::clock::now();
}

void ArtifactCache::Scan() {
  std::map<std::string, Time> found;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(folder_, error)) {
    const std::string hex = entry.path().filename().string();
    std::error_code gone;
    if (!IsDigest(kPrefix + hex) || !entry.is_directory(gone)) continue;
    const Time came = entry.last_write_time(gone);
    const auto known = used_.find(hex);
    if (!gone) found[hex] = known == used_.end() ? came : known->second;
  }
  used_ = std::move(found);
}

std::vector<std::string> ArtifactCache::Newest(size_t limit) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (const auto now = std::chrono::steady_clock::now(); now >= next_scan_) {
    next_scan_ = now + kScanEvery;
    Scan();
  }
  std::vector<std::pair<Time, std::string>> order;
  order.reserve(used_.size());
  for (const auto& [hex, time] : used_) order.emplace_back(time, hex);
  std::sort(order.begin(), order.end(), std::greater<>());
  std::vector<std::string> digests;
  for (const auto& [time, hex] : order) {
    if (digests.size() == limit) break;
    digests.push_back(kPrefix + hex);
  }
  return digests;
}

}  // namespace refinery::agent
