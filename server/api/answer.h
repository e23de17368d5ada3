// server/api/answer.h
//
// The frame of a unary handler: ask the gate, run the command on the coordinator's loop, answer when what it did is durable.
//
//   return Answer(coordinator, gate, context, "/refinery.v1.JobService/GetJob", [=](Coordinator::Turn& turn, security::Call& call) {
//     ...fill the response...; return absl::OkStatus();
//   });
//
// Threads: a handler runs in gRPC's threads and never blocks; the command runs on the loop.

#pragma once

#include <grpcpp/support/server_callback.h>

#include <memory>
#include <string_view>
#include <utility>

#include "common/grpc_status.h"
#include "server/api/coordinator.h"
#include "server/security/gate.h"

namespace refinery::api {

template <typename Command>
grpc::ServerUnaryReactor* Answer(Coordinator* coordinator, security::Gate* gate, grpc::CallbackServerContext* context,
                                 std::string_view method, Command command) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  StatusOr<std::shared_ptr<security::Call>> call = gate->Admit(*context, method);
  if (!call.ok()) {
    reactor->Finish(ToGrpc(call.status()));
    return reactor;
  }
  coordinator->Post([reactor, call = *std::move(call), command = std::move(command)](Coordinator::Turn& turn) {
    const Status status = command(turn, *call);
    call->set_outcome(status);
    turn.replies.push_back([reactor, call, status](const Status& committed) {
      if (!committed.ok()) call->set_outcome(committed);  // nothing of what it did is left
      reactor->Finish(ToGrpc(committed.ok() ? status : committed));
    });
  });
  return reactor;
}

// A stream that is refused before it began.
template <typename Response>
class RefusedStream final : public grpc::ServerWriteReactor<Response> {
 public:
  explicit RefusedStream(const Status& status) { this->Finish(ToGrpc(status)); }
  void OnDone() override { delete this; }
};

}  // namespace refinery::api
