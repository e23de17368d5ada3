// server/security/audit_log.h
//
// Who changed what: one JSON object a line, appended to a file that only its owner can read. It holds names, methods, resources
// and outcomes, never tokens, recipes or error texts (which could repeat what a caller sent). At kMaxBytes the file becomes
// <file>.1 and a new one begins. A line that cannot be written is reported in the program's log and does not stop the call.
//
// Threads: any.

#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <mutex>
#include <string>

#include "common/status.h"

namespace refinery::security {

struct AuditEntry {
  int64_t time_ms = 0;
  std::string principal, role, tenant, peer;
  std::string method;      // "JobService/CreateJob"
  std::string resource;    // "tenants/default/jobs/x"; empty when there is none
  std::string request_id;
  std::string outcome;     // "OK" or the name of a status code
  std::string reason;      // of an error, e.g. "ROLE_NOT_ALLOWED"
};

class AuditLog {
 public:
  static constexpr uint64_t kMaxBytes = uint64_t{64} << 20;

  // An empty path: writes nothing. UNAVAILABLE when the file cannot be opened.
  static StatusOr<std::unique_ptr<AuditLog>> Open(const std::filesystem::path& path, uint64_t max_bytes = kMaxBytes);
  ~AuditLog();

  void Write(const AuditEntry& entry);

 private:
  AuditLog(std::filesystem::path path, uint64_t max_bytes) : path_(std::move(path)), max_bytes_(max_bytes) {}
  Status OpenFile();

  const std::filesystem::path path_;
  const uint64_t max_bytes_;
  std::mutex mutex_;
  int fd_ = -1;
  uint64_t bytes_ = 0;
};

}  // namespace refinery::security
