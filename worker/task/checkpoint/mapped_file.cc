#include "worker/task/checkpoint/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace refinery::checkpoint {

StatusOr<std::shared_ptr<const MappedFile>> MappedFile::Open(const std::filesystem::path& path) {
  int fd = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    std::string message = Join("cannot open ", path.string(), ": ", std::strerror(errno));
    return errno == ENOENT || errno == ENOTDIR ? NotFound(message) : Unavailable(message);
  }
  struct stat facts {};
  if (::fstat(fd, &facts) != 0 || !S_ISREG(facts.st_mode)) {
    ::close(fd);
    return NotFound(path.string(), " is not a regular file");
  }
  std::shared_ptr<MappedFile> file(new MappedFile);
  file->path_ = path;
  file->size_ = static_cast<uint64_t>(facts.st_size);
  if (file->size_ > 0) {
    void* address = ::mmap(nullptr, file->size_, PROT_READ, MAP_SHARED, fd, 0);
    int error = errno;
    if (address == MAP_FAILED) {
      ::close(fd);
      return Unavailable("cannot map ", path.string(), ": ", std::strerror(error));
    }
    file->data_ = static_cast<const uint8_t*>(address);
  }
  ::close(fd);
  return std::shared_ptr<const MappedFile>(std::move(file));
}

void MappedFile::Release(uint64_t begin, uint64_t end) const {
  static const auto kPage = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  const uint64_t first = (begin + kPage - 1) / kPage * kPage, last = std::min(end, size_) / kPage * kPage;
  // A whole page less is nothing to give back. Failure would cost memory, nothing else.
  if (first < last) (void)::madvise(const_cast<uint8_t*>(data_) + first, last - first, MADV_DONTNEED);
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) ::munmap(const_cast<uint8_t*>(data_), size_);
}

}  // namespace refinery::checkpoint
