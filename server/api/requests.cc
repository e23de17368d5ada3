#include "server/api/requests.h"

#include <algorithm>
#include <cctype>

#include "common/digest.h"
#include "common/error_details.h"

namespace refinery::api {
namespace {

constexpr size_t kMaxIdBytes = 64;

std::string ContentOf(std::string_view method, const google::protobuf::Message& request) {
  return DigestOf(Join(method, "\n", request.SerializeAsString()));
}

}  // namespace

Status CheckRequestId(const std::string& id) {
  const bool good = std::ranges::all_of(id, [](unsigned char c) { return std::isalnum(c) != 0 || c == '-' || c == '_'; });
  if (good && id.size() <= kMaxIdBytes) return absl::OkStatus();
  return WithField(InvalidArgument("request_id must be at most ", kMaxIdBytes, " letters, digits, '-' and '_'; a UUID is best"),
                   "request_id");
}

StatusOr<bool> Requests::WasDone(const std::string& caller, std::string_view method, const google::protobuf::Message& request,
                                 const std::string& id, std::chrono::milliseconds now) {
  while (!oldest_.empty() && (oldest_.size() > kMaxRequests || now - oldest_.front().time > kMaxAge)) {
    content_.erase(oldest_.front().key);
    oldest_.pop_front();
  }
  if (id.empty()) return false;
  const auto found = content_.find(Join(caller, "/", id));
  if (found == content_.end()) return false;
  if (found->second == ContentOf(method, request)) return true;
  return WithField(WithReason(AlreadyExists("request ", id, " was already used for another call; use a new request id"),
                              "REQUEST_ID_REUSED"),
                   "request_id");
}

void Requests::Remember(const std::string& caller, std::string_view method, const google::protobuf::Message& request,
                        const std::string& id, std::chrono::milliseconds now) {
  if (id.empty()) return;
  const std::string key = Join(caller, "/", id);
  if (content_.emplace(key, ContentOf(method, request)).second) oldest_.push_back({.key = key, .time = now});
}

}  // namespace refinery::api
