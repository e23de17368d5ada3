#include "server/security/gate.h"

#include <grpc/grpc_security_constants.h>
#include <spdlog/spdlog.h>

#include "common/digest.h"
#include "common/error_details.h"

namespace refinery::security {
namespace {

constexpr std::string_view kBearer = "Bearer ";
constexpr size_t kMaxTokenBytes = 256;

std::string ShortName(std::string_view method) {
  const size_t dot = method.find_last_of('.');
  return std::string(method.substr(dot == std::string_view::npos ? 0 : dot + 1));
}

Status Unauthenticated(std::string_view sentence, std::string_view reason) {
  return WithReason(absl::UnauthenticatedError(View(sentence)), reason);
}

Status PermissionDenied(std::string_view sentence, std::string_view reason) {
  return WithReason(absl::PermissionDeniedError(View(sentence)), reason);
}

}  // namespace

Call::~Call() {
  if (gate_ == nullptr) return;  // it was not let in
  if (method_->audited) gate_->Audit(*this, outcome_);
  if (principal_.role != Role::kWorker) gate_->limiter_.End(principal_.name);
}

StatusOr<std::shared_ptr<Gate>> Gate::Open(GateOptions options) {
  std::shared_ptr<Gate> gate(new Gate(std::move(options)));
  RF_ASSIGN_OR_RETURN(gate->audit_, AuditLog::Open(gate->options_.audit_log));
  if (gate->authenticates()) RF_RETURN_IF_ERROR(gate->Load());
  return gate;
}

Status Gate::Load() {
  std::error_code error;
  loaded_ = std::filesystem::last_write_time(options_.principals, error);
  RF_ASSIGN_OR_RETURN(const v1::PrincipalFile file, ReadPrincipals(options_.principals));
  if (file.principals().empty()) {
    return NotFound(options_.principals.string(), " names nobody, so nobody could call; make an admin with `refinery admin token "
                    "create NAME --role admin --file ", options_.principals.string(), "`");
  }
  by_token_.clear();
  by_certificate_.clear();
  for (const v1::Principal& entry : file.principals()) {
    const Principal principal{.name = entry.name(), .role = *ParseRole(entry.role()), .tenant = entry.tenant()};
    if (!entry.token_digest().empty()) by_token_[entry.token_digest()] = principal;
    if (!entry.certificate().empty()) by_certificate_[entry.certificate()] = principal;
  }
  return absl::OkStatus();
}

// Under the lock. A file that has become wrong changes nothing: those who are known stay known.
void Gate::ReloadIfChanged() {
  const auto now = std::chrono::steady_clock::now();
  if (now - looked_ < options_.reload) return;
  looked_ = now;
  std::error_code error;
  const auto written = std::filesystem::last_write_time(options_.principals, error);
  if (error || written == loaded_) return;
  if (const Status status = Load(); !status.ok()) {
    spdlog::error("the principals stay as they were, because {}", Message(status));
  } else {
    spdlog::info("principals read again: {} tokens, {} certificates", by_token_.size(), by_certificate_.size());
  }
}

StatusOr<Principal> Gate::Identify(const grpc::ServerContextBase& context) {
  if (!authenticates()) return Principal{.name = "anonymous", .role = Role::kAdmin};
  std::lock_guard lock(mutex_);
  ReloadIfChanged();
  const auto [begin, end] = context.client_metadata().equal_range("authorization");
  if (begin != end) {
    const std::string_view value(begin->second.data(), begin->second.size());
    if (std::next(begin) != end || !value.starts_with(kBearer) || value.size() > kMaxTokenBytes) {
      return Unauthenticated("the authorization header must be one 'Bearer TOKEN'", "BAD_TOKEN");
    }
    const auto found = by_token_.find(DigestOf(value.substr(kBearer.size())));
    if (found == by_token_.end()) {
      return Unauthenticated("this token is not known here; it may have been revoked. Ask an admin for another", "BAD_TOKEN");
    }
    return found->second;
  }
  // Only a chain that TLS has verified gets here.
  if (const auto auth = context.auth_context(); auth != nullptr && auth->IsPeerAuthenticated()) {
    for (const grpc::string_ref& name : auth->FindPropertyValues(GRPC_X509_CN_PROPERTY_NAME)) {
      const auto found = by_certificate_.find(std::string(name.data(), name.size()));
      if (found != by_certificate_.end()) return found->second;
    }
  }
  return Unauthenticated("this coordinator wants to know who calls: give --token-file FILE with a token of `refinery admin token "
                         "create`", "NO_TOKEN");
}

StatusOr<std::shared_ptr<Call>> Gate::Admit(const grpc::ServerContextBase& context, std::string_view name) {
  auto call = std::make_shared<Call>();
  call->peer_ = context.peer();
  call->method_ = FindMethod(name);
  RF_CHECK(call->method_ != nullptr);
  const Status status = [&]() -> Status {
    StatusOr<Principal> principal = Identify(context);
    if (!principal.ok()) return principal.status();
    call->principal_ = *std::move(principal);
    if ((call->method_->roles & static_cast<int>(call->principal_.role)) == 0) {
      return PermissionDenied(Join(call->principal_.name, " is a ", RoleName(call->principal_.role), ", who may not call ",
                                   ShortName(name)),
                              "ROLE_NOT_ALLOWED");
    }
    if (call->principal_.role == Role::kWorker) return absl::OkStatus();
    return limiter_.Begin(call->principal_.name, Limiter::Clock::now());
  }();
  if (!status.ok()) {
    Audit(*call, status);
    return status;
  }
  call->gate_ = shared_from_this();
  return call;
}

void Gate::Audit(const Call& call, const Status& outcome) {
  const auto now = std::chrono::system_clock::now().time_since_epoch();
  audit_->Write({.time_ms = std::chrono::duration_cast<std::chrono::milliseconds>(now).count(),
                 .principal = call.principal_.name,
                 .role = call.principal_.name.empty() ? "" : RoleName(call.principal_.role),
                 .tenant = call.principal_.tenant,
                 .peer = call.peer_,
                 .method = ShortName(call.method_->name),
                 .resource = call.resource_,
                 .request_id = call.request_id_,
                 .outcome = absl::StatusCodeToString(outcome.code()),
                 .reason = outcome.ok() ? "" : ReasonOf(outcome)});
}

}  // namespace refinery::security
