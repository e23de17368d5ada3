// common/grpc_status.h
//
// The one place where absl::Status and grpc::Status are turned into each other. The codes are the same numbers in both; the
// text is passed on as it is, cut to limits::kMaxErrorBytes so that it fits into HTTP/2 trailers. Details (common/error_details.h)
// travel along; every error that leaves a server has a reason.

#pragma once

#include <grpcpp/support/status.h>

#include "common/status.h"

namespace refinery {

grpc::Status ToGrpc(const Status& status);
Status FromGrpc(const grpc::Status& status);

}  // namespace refinery
