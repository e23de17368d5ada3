#include "common/grpc_status.h"

#include "common/limits.h"

namespace refinery {

grpc::Status ToGrpc(const Status& status) {
  if (status.ok()) return grpc::Status::OK;
  return {static_cast<grpc::StatusCode>(status.code()), Message(status).substr(0, limits::kMaxErrorBytes)};
}

Status FromGrpc(const grpc::Status& status) {
  if (status.ok()) return absl::OkStatus();
  return Status(static_cast<absl::StatusCode>(status.error_code()), View(status.error_message()));
}

}  // namespace refinery
