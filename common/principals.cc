#include "common/principals.h"

#include <sys/random.h>
#include <sys/stat.h>

#include <set>

#include "common/digest.h"
#include "common/files.h"
#include "common/yaml_message.h"

namespace refinery {
namespace {

constexpr uint64_t kMaxFileBytes = 4 << 20;
constexpr size_t kMaxNameBytes = 63;
constexpr char kAlphabet[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";

Status CheckPrincipal(const v1::Principal& principal) {
  RF_RETURN_IF_ERROR(CheckName(principal.name(), "name"));
  RF_ASSIGN_OR_RETURN(const Role role, ParseRole(principal.role()));
  if (!principal.tenant().empty()) RF_RETURN_IF_ERROR(CheckName(principal.tenant(), "tenant"));
  if (principal.tenant().empty() && (role == Role::kViewer || role == Role::kSubmitter)) {
    return InvalidArgument("a ", principal.role(), " needs a tenant");
  }
  if (!principal.tenant().empty() && (role == Role::kWorker || role == Role::kAdmin)) {
    return InvalidArgument("a ", principal.role(), " is for all tenants; leave tenant out");
  }
  if (principal.token_digest().empty() && principal.certificate().empty()) {
    return InvalidArgument("neither token_digest nor certificate is given");
  }
  if (!principal.token_digest().empty() && !IsDigest(principal.token_digest())) {
    return InvalidArgument("token_digest is not a digest; `refinery admin token create` makes it");
  }
  return absl::OkStatus();
}

}  // namespace

StatusOr<Role> ParseRole(const std::string& name) {
  for (const Role role : {Role::kViewer, Role::kSubmitter, Role::kWorker, Role::kAdmin}) {
    if (name == RoleName(role)) return role;
  }
  return InvalidArgument("role is '", name, "'; it must be viewer, submitter, worker or admin");
}

const char* RoleName(Role role) {
  switch (role) {
    case Role::kViewer: return "viewer";
    case Role::kSubmitter: return "submitter";
    case Role::kWorker: return "worker";
    case Role::kAdmin: return "admin";
  }
  return "";
}

Status CheckName(const std::string& name, const std::string& what) {
  bool good = !name.empty() && name.size() <= kMaxNameBytes && name.front() != '-' && name.back() != '-';
  for (const char c : name) good = good && ((c >= 'a' && c <= 'z') || (c >= '0' && c <= '9') || c == '-');
  if (good) return absl::OkStatus();
  return InvalidArgument(what, " must be 1 to ", kMaxNameBytes, " lower-case letters, digits and inner '-', is '",
                         name.substr(0, 80), "'");
}

StatusOr<v1::PrincipalFile> ReadPrincipals(const std::filesystem::path& path) {
  v1::PrincipalFile file;
  StatusOr<std::string> text = ReadFile(path, kMaxFileBytes);
  if (absl::IsNotFound(text.status())) return file;
  if (!text.ok()) return text.status();
  YamlPlaces places;
  RF_RETURN_IF_ERROR(YamlToMessage(*text, path.string(), &file, &places));
  std::set<std::string> seen;
  for (const v1::Principal& principal : file.principals()) {
    const std::string where = Join(path.string(), ": principal '", principal.name(), "'");
    RF_RETURN_IF_ERROR(Annotate(CheckPrincipal(principal), where));
    for (const std::string& unique : {Join("name ", principal.name()), Join("token ", principal.token_digest()),
                                      Join("certificate ", principal.certificate())}) {
      if (!unique.ends_with(' ') && !seen.insert(unique).second) return InvalidArgument(where, ": its ", unique, " stands twice");
    }
  }
  return file;
}

Status WritePrincipals(const std::filesystem::path& path, const v1::PrincipalFile& file) {
  const mode_t before = umask(0077);
  const Status status = WriteFileAtomically(
      path, Join("# Who may call the coordinator; tokens stand here as SHA-256 only. Written by `refinery admin token`.\n",
                 MessageToYaml(file)));
  umask(before);
  return status;
}

StatusOr<std::string> NewToken() {
  unsigned char bytes[32];
  if (getrandom(bytes, sizeof bytes, 0) != sizeof bytes) return Unavailable("the system gives no random bytes");
  std::string token = "rf_";
  uint32_t bits = 0;
  int count = 0;
  for (const unsigned char byte : bytes) {
    bits = (bits << 8 | byte) & 0xffff;
    for (count += 8; count >= 6; count -= 6) token += kAlphabet[(bits >> (count - 6)) & 63];
  }
  token += kAlphabet[(bits << (6 - count)) & 63];
  return token;
}

}  // namespace refinery
