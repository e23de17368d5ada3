#include "common/error_details.h"

#include <google/protobuf/message.h>

#include <algorithm>

#include "refinery/v1/error.pb.h"

namespace refinery {
namespace {

constexpr char kInfo[] = "type.googleapis.com/google.rpc.ErrorInfo";
constexpr char kRetry[] = "type.googleapis.com/google.rpc.RetryInfo";
constexpr char kBadRequest[] = "type.googleapis.com/google.rpc.BadRequest";
constexpr char kResource[] = "type.googleapis.com/google.rpc.ResourceInfo";
constexpr size_t kMaxDescription = 512;  // trailers must stay under 8 KiB, and the sentence is in there once more

Status With(Status status, const char* type, const google::protobuf::Message& detail) {
  if (!status.ok()) status.SetPayload(type, absl::Cord(detail.SerializeAsString()));
  return status;
}

template <typename Detail>
Detail Get(const Status& status, const char* type) {
  Detail detail;
  const absl::optional<absl::Cord> payload = status.GetPayload(type);
  if (payload.has_value() && !detail.ParseFromString(std::string(*payload))) detail.Clear();
  return detail;
}

// "STALE_LEASE" of "STALE_LEASE: the lease of ...".
std::string LeadingCode(std::string_view message) {
  const size_t end = std::min(message.find_first_not_of("ABCDEFGHIJKLMNOPQRSTUVWXYZ_"), message.size());
  const std::string_view word = message.substr(0, end);
  return word.find('_') != std::string_view::npos ? std::string(word) : "";
}

}  // namespace

Status WithReason(Status status, std::string_view reason, const std::map<std::string, std::string>& metadata) {
  v1::ErrorInfo info;
  info.set_reason(std::string(reason));
  info.set_domain("refinery");
  info.mutable_metadata()->insert(metadata.begin(), metadata.end());
  return With(std::move(status), kInfo, info);
}

Status WithField(Status status, std::string_view field) {
  v1::BadRequest bad;
  v1::BadRequest::FieldViolation* violation = bad.add_field_violations();
  violation->set_field(std::string(field));
  violation->set_description(Message(status).substr(0, kMaxDescription));
  return With(std::move(status), kBadRequest, bad);
}

Status WithRetryAfter(Status status, std::chrono::milliseconds delay) {
  v1::RetryInfo retry;
  retry.mutable_retry_delay()->set_seconds(delay.count() / 1000);
  retry.mutable_retry_delay()->set_nanos(static_cast<int32_t>(delay.count() % 1000) * 1'000'000);
  return With(std::move(status), kRetry, retry);
}

Status WithResource(Status status, std::string_view type, std::string_view name) {
  v1::ResourceInfo resource;
  resource.set_resource_type(std::string(type));
  resource.set_resource_name(std::string(name.substr(0, kMaxDescription)));
  return With(std::move(status), kResource, resource);
}

bool HasReason(const Status& status) { return status.GetPayload(kInfo).has_value(); }

std::string ReasonOf(const Status& status) {
  if (status.ok()) return "";
  std::string reason = Get<v1::ErrorInfo>(status, kInfo).reason();
  if (reason.empty()) reason = LeadingCode(Message(status));
  return reason.empty() ? absl::StatusCodeToString(status.code()) : reason;
}

std::string FieldOf(const Status& status) {
  const auto bad = Get<v1::BadRequest>(status, kBadRequest);
  return bad.field_violations().empty() ? "" : bad.field_violations(0).field();
}

std::string ResourceOf(const Status& status) {
  const auto resource = Get<v1::ResourceInfo>(status, kResource);
  return resource.resource_type().empty() ? "" : Join(resource.resource_type(), "/", resource.resource_name());
}

std::optional<std::chrono::milliseconds> RetryAfterOf(const Status& status) {
  const auto retry = Get<v1::RetryInfo>(status, kRetry);
  if (!retry.has_retry_delay()) return std::nullopt;
  return std::chrono::milliseconds(retry.retry_delay().seconds() * 1000 + retry.retry_delay().nanos() / 1'000'000);
}

}  // namespace refinery
