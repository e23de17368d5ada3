#include "server/security/audit_log.h"

#include <fcntl.h>
#include <spdlog/spdlog.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>

namespace refinery::security {

StatusOr<std::unique_ptr<AuditLog>> AuditLog::Open(const std::filesystem::path& path, uint64_t max_bytes) {
  std::unique_ptr<AuditLog> log(new AuditLog(path, max_bytes));
  if (!path.empty()) RF_RETURN_IF_ERROR(log->OpenFile());
  return log;
}

AuditLog::~AuditLog() {
  if (fd_ >= 0) close(fd_);
}

Status AuditLog::OpenFile() {
  if (fd_ >= 0) close(fd_);
  fd_ = open(path_.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600);
  struct stat info {};
  if (fd_ < 0 || fstat(fd_, &info) != 0) {
    return Unavailable("cannot open the audit log ", path_.string(), ": ", std::strerror(errno));
  }
  bytes_ = static_cast<uint64_t>(info.st_size);
  return absl::OkStatus();
}

void AuditLog::Write(const AuditEntry& entry) {
  if (path_.empty()) return;
  nlohmann::ordered_json line = {{"time_ms", entry.time_ms}, {"principal", entry.principal}, {"role", entry.role},
                                 {"tenant", entry.tenant},   {"peer", entry.peer},           {"method", entry.method},
                                 {"resource", entry.resource}};
  if (!entry.request_id.empty()) line["request_id"] = entry.request_id;
  line["outcome"] = entry.outcome;
  if (!entry.reason.empty()) line["reason"] = entry.reason;
  // Callers choose ids: whatever is no UTF-8 is replaced, not thrown.
  const std::string text = line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
  std::lock_guard lock(mutex_);
  if (bytes_ > 0 && bytes_ + text.size() > max_bytes_) {
    std::error_code ignored;
    std::filesystem::rename(path_, path_.string() + ".1", ignored);
    if (const Status status = OpenFile(); !status.ok()) spdlog::error("{}", Message(status));
  }
  if (fd_ < 0 || write(fd_, text.data(), text.size()) != static_cast<ssize_t>(text.size())) {
    spdlog::error("audit log: a line for {} by {} could not be written: {}", entry.method, entry.principal, std::strerror(errno));
    return;
  }
  bytes_ += text.size();
}

}  // namespace refinery::security
