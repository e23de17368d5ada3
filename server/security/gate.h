// server/security/gate.h
//
// The door of the API. Every handler begins with Admit, which finds out who calls (bearer token or client certificate), whether
// that role may call this method, and whether the caller has not asked for too much already; the Call it returns is kept until
// the answer is out. gRPC 1.51 has no interceptor that can refuse a call, hence the line in each handler.
//
// Without a file of principals nobody is asked who he is: everyone is the admin "anonymous". That is meant for loopback.
//
// Errors: UNAUTHENTICATED, PERMISSION_DENIED, RESOURCE_EXHAUSTED, UNAVAILABLE; each with a reason.  Threads: any.

#pragma once

#include <grpcpp/server_context.h>

#include <atomic>
#include <filesystem>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include "common/principals.h"
#include "common/status.h"
#include "server/security/audit_log.h"
#include "server/security/limiter.h"
#include "server/security/methods.h"

namespace refinery::security {

struct Principal {
  std::string name;
  Role role = Role::kViewer;
  std::string tenant;   // empty: all tenants

  bool MaySee(const std::string& of_tenant) const { return tenant.empty() || tenant == of_tenant; }
};

struct GateOptions {
  std::filesystem::path principals;   // empty: no authentication
  std::filesystem::path audit_log;    // empty: none
  Limits limits;                      // of each viewer, submitter or admin; none without principals, nor for workers
  std::chrono::milliseconds reload{1'000};  // how often the file of principals is looked at
};

class Gate;

// A call that was let in. Thread-safe as far as it goes: the handler's thread fills it in, then one thread ends it.
class Call {
 public:
  ~Call();
  const Principal& principal() const { return principal_; }
  // For the audit log.
  void set_resource(std::string resource) { resource_ = std::move(resource); }
  void set_request_id(std::string id) { request_id_ = std::move(id); }
  void set_outcome(const Status& status) { outcome_ = status; }

 private:
  friend class Gate;
  std::shared_ptr<Gate> gate_;
  const Method* method_ = nullptr;
  Principal principal_;
  std::string peer_, resource_, request_id_;
  Status outcome_;
};

class Gate : public std::enable_shared_from_this<Gate> {
 public:
  // INVALID_ARGUMENT for a bad file of principals; NOT_FOUND when it is empty (then nobody could call).
  static StatusOr<std::shared_ptr<Gate>> Open(GateOptions options);

  // `method` as in methods.h.
  StatusOr<std::shared_ptr<Call>> Admit(const grpc::ServerContextBase& context, std::string_view method);

  bool authenticates() const { return !options_.principals.empty(); }

 private:
  explicit Gate(GateOptions options) : options_(std::move(options)), limiter_(authenticates() ? options_.limits : Limits()) {}
  Status Load();
  void ReloadIfChanged();
  StatusOr<Principal> Identify(const grpc::ServerContextBase& context);
  void Audit(const Call& call, const Status& outcome);
  friend class Call;

  const GateOptions options_;
  Limiter limiter_;
  std::unique_ptr<AuditLog> audit_;

  std::mutex mutex_;  // guards what follows
  std::map<std::string, Principal> by_token_;        // digest -> principal
  std::map<std::string, Principal> by_certificate_;  // common name -> principal
  std::filesystem::file_time_type loaded_;
  std::chrono::steady_clock::time_point looked_;
};

}  // namespace refinery::security
