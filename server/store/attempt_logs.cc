#include "server/store/attempt_logs.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>

#include "common/files.h"
#include "common/limits.h"

namespace refinery::store {
namespace {

namespace fs = std::filesystem;

std::string Replace(std::string text, std::string_view from, std::string_view to) {
  for (size_t at = text.find(from); at != std::string::npos; at = text.find(from, at + to.size())) {
    text.replace(at, from.size(), to);
  }
  return text;
}

// Writes all of `text` at `offset`.
Status WriteAt(const fs::path& file, uint64_t offset, std::string_view text) {
  const int fd = open(file.c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0644);
  if (fd < 0) return Unavailable(file.string(), ": cannot be opened: ", std::strerror(errno));
  Status status;
  while (!text.empty()) {
    const ssize_t n = pwrite(fd, text.data(), text.size(), static_cast<off_t>(offset));
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) {
      const std::string text_of_error = Join(file.string(), ": cannot be written: ", std::strerror(errno));
      status = errno == ENOSPC || errno == EDQUOT ? ResourceExhausted(text_of_error) : Unavailable(text_of_error);
      break;
    }
    offset += n;
    text.remove_prefix(n);
  }
  close(fd);
  return status;
}

}  // namespace

fs::path AttemptLogs::File(const std::string& job, const std::string& path, uint32_t attempt) const {
  return folder_ / job / Replace(path, "/", "__") / Join(attempt, ".log");
}

AttemptLogs::Sizes& AttemptLogs::SizesOf(const std::string& job) {
  const auto [it, is_new] = sizes_.try_emplace(job);
  if (!is_new) return it->second;
  std::error_code error;
  for (fs::recursive_directory_iterator file(folder_ / job, error), end; !error && file != end; file.increment(error)) {
    if (file->path().extension() != ".log") continue;
    const std::string stem = file->path().stem().string();
    uint32_t attempt = 0;
    std::from_chars(stem.data(), stem.data() + stem.size(), attempt);
    const std::string path = Replace(file->path().parent_path().filename().string(), "__", "/");
    it->second[{path, attempt}] = fs::file_size(file->path(), error);
  }
  return it->second;
}

Status AttemptLogs::Append(const std::string& job, const std::string& path, uint32_t attempt, uint64_t offset,
                           std::string_view text) {
  uint64_t& size = SizesOf(job)[{path, attempt}];
  if (offset < size) {
    const uint64_t known = std::min<uint64_t>(size - offset, text.size());
    text.remove_prefix(known);
    offset += known;
  }
  if (offset >= limits::kMaxLogBytesPerAttempt) return absl::OkStatus();
  text = text.substr(0, limits::kMaxLogBytesPerAttempt - offset);
  if (text.empty()) return absl::OkStatus();

  const fs::path file = File(job, path, attempt);
  RF_RETURN_IF_ERROR(CreateFolders(file.parent_path()));
  if (offset > size) {
    std::string gap = Join("[", offset - size, " bytes of the log are missing]");
    gap.resize(offset - size - 1, ' ');
    RF_RETURN_IF_ERROR(WriteAt(file, size, gap + "\n"));
    size = offset;
  }
  RF_RETURN_IF_ERROR(WriteAt(file, offset, text));
  size += text.size();
  return absl::OkStatus();
}

std::vector<AttemptLogs::Size> AttemptLogs::List(const std::string& job) {
  std::vector<Size> sizes;
  for (const auto& [key, bytes] : SizesOf(job)) sizes.push_back({key.first, key.second, bytes});
  return sizes;
}

StatusOr<std::string> AttemptLogs::Read(const std::string& job, const std::string& path, uint32_t attempt, uint64_t offset,
                                        size_t max_bytes) const {
  const fs::path file = File(job, path, attempt);
  const int fd = open(file.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return std::string();
  std::string text(max_bytes, '\0');
  const ssize_t n = pread(fd, text.data(), text.size(), static_cast<off_t>(offset));
  close(fd);
  if (n < 0) return Unavailable(file.string(), ": cannot be read: ", std::strerror(errno));
  text.resize(n);
  return text;
}

}  // namespace refinery::store
