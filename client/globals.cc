#include "client/globals.h"

#include "client/exit_code.h"
#include "common/grpc_status.h"
#include "common/limits.h"

namespace refinery::client {
namespace {
constexpr std::chrono::milliseconds kConnectWait{3'000};
}  // namespace

StatusOr<Connection> Connect(const Globals& globals) { return Connect(globals.coordinator, globals.security); }

StatusOr<Connection> Connect(const std::string& address, const ChannelSecurity& security) {
  Connection connection;
  connection.address = address;
  RF_ASSIGN_OR_RETURN(connection.channel, MakeChannel(address, security));
  if (!WaitForConnection(*connection.channel, address, kConnectWait).ok()) {
    return Unavailable("no coordinator answers at ", address,
                       "; start refineryd, name its address with --coordinator HOST:PORT, or use `refinery run RECIPE`",
                       security.tls.any() ? " (with TLS: `refinery doctor` looks at the certificates)" : "");
  }
  connection.jobs = v1::JobService::NewStub(connection.channel);
  return connection;
}

void SetDeadline(grpc::ClientContext* context) {
  context->set_deadline(std::chrono::system_clock::now() + limits::kRpcDeadline);
}

StatusOr<v1::Job> GetJob(Connection& connection, const std::string& id) {
  grpc::ClientContext context;
  SetDeadline(&context);
  v1::GetJobRequest request;
  request.set_id(id);
  v1::Job job;
  RF_RETURN_IF_ERROR(FromGrpc(connection.jobs->GetJob(&context, request, &job)));
  return job;
}

int ExitCodeOf(const Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kOk:
      return kOk;
    case absl::StatusCode::kCancelled:
      return kDetached;
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kAlreadyExists:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kOutOfRange:
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kUnimplemented:
    case absl::StatusCode::kUnauthenticated:
    case absl::StatusCode::kPermissionDenied:
      return kWrongInput;
    default:
      return kFailed;
  }
}

}  // namespace refinery::client
