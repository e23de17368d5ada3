#include "common/grpc_status.h"

#include "common/error_details.h"
#include "common/limits.h"
#include "refinery/v1/error.pb.h"

namespace refinery {
namespace {

constexpr size_t kMaxDetailsBytes = 2048;  // with the text, under the 8 KiB that clients take in trailers

}  // namespace

grpc::Status ToGrpc(const Status& status) {
  if (status.ok()) return grpc::Status::OK;
  // A reason that was given keeps its metadata.
  const Status full = HasReason(status) ? status : WithReason(status, ReasonOf(status));
  v1::ErrorStatus details;
  details.set_code(static_cast<int>(full.code()));
  full.ForEachPayload([&](absl::string_view type, const absl::Cord& payload) {
    if (details.ByteSizeLong() + payload.size() > kMaxDetailsBytes) return;
    google::protobuf::Any* any = details.add_details();
    any->set_type_url(Str(type));
    any->set_value(std::string(payload));
  });
  return {static_cast<grpc::StatusCode>(status.code()), Message(status).substr(0, limits::kMaxErrorBytes),
          details.SerializeAsString()};
}

Status FromGrpc(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  Status result(static_cast<absl::StatusCode>(status.error_code()), View(status.error_message()));
  v1::ErrorStatus details;
  if (!status.error_details().empty() && details.ParseFromString(status.error_details())) {
    for (const google::protobuf::Any& any : details.details()) {
      result.SetPayload(View(any.type_url()), absl::Cord(any.value()));
    }
  }
  return result;
}

}  // namespace refinery
