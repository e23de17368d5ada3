// tests/server/api/fake_worker.h
//
// A worker that plays tasks instead of running them: it uploads a small artifact for each and completes it, over real gRPC.

#pragma once

#include <grpcpp/channel.h>

#include <chrono>
#include <memory>
#include <string>

#include "common/artifact_client.h"
#include "common/digest.h"
#include "common/files.h"
#include "common/grpc_status.h"
#include "refinery/v1/worker_service.grpc.pb.h"
#include "tests/server/store/temp_folder.h"

namespace refinery::testing {

class FakeWorker {
 public:
  FakeWorker(const std::shared_ptr<grpc::Channel>& channel, std::string id, std::string incarnation = "i1")
      : stub_(v1::WorkerService::NewStub(channel)), artifacts_(channel), id_(std::move(id)),
        incarnation_(std::move(incarnation)) {}

  v1::SynchronizeRequest Request(const std::vector<v1::LeaseToken>& running = {}, uint32_t free_slots = 1) const {
    v1::SynchronizeRequest request;
    request.mutable_worker()->set_id(id_);
    request.mutable_worker()->set_host("test");
    request.set_incarnation(incarnation_);
    request.set_free_slots(free_slots);
    for (const v1::LeaseToken& token : running) *request.add_running()->mutable_lease() = token;
    return request;
  }

  StatusOr<v1::SynchronizeResponse> Synchronize(const v1::SynchronizeRequest& request, int timeout_ms = 5'000) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(timeout_ms));
    v1::SynchronizeResponse response;
    RF_RETURN_IF_ERROR(FromGrpc(stub_->Synchronize(&context, request, &response)));
    return response;
  }

  // The next lease, or one without a token when the poll ended without any.
  StatusOr<v1::Lease> Next(int timeout_ms = 5'000) {
    RF_ASSIGN_OR_RETURN(const v1::SynchronizeResponse response, Synchronize(Request(), timeout_ms));
    return response.grants().empty() ? v1::Lease() : response.grants(0);
  }

  // Uploads what the task is said to have made. The bytes depend on the task alone.
  StatusOr<v1::ArtifactRef> Upload(const v1::Lease& lease) {
    TempFolder folder;
    const std::string text = Join("output of ", lease.token().path(), "\n");
    const char* name = lease.spec().has_train() ? "curve.jsonl" : lease.spec().has_curate() ? "summary.json" : "out.txt";
    RF_RETURN_IF_ERROR(WriteFileAtomically(folder.path() / name, lease.spec().has_curate() ? "{}" : text));
    return artifacts_.UploadFolder(folder.path(), "output");
  }

  StatusOr<v1::CompleteTaskRequest> MakeSuccess(const v1::Lease& lease) {
    v1::CompleteTaskRequest request;
    *request.mutable_lease() = lease.token();
    RF_ASSIGN_OR_RETURN(*request.mutable_success()->mutable_output(), Upload(lease));
    request.mutable_success()->set_seconds(0.25);
    if (lease.spec().has_train()) {
      v1::Measurement* measurement = request.mutable_success()->add_measurements();
      measurement->set_name("validation_loss");
      measurement->set_value(2.0 + lease.spec().train().settings().learning_rate());
    }
    request.set_log(Join("did ", lease.token().path(), "\n"));
    return request;
  }

  Status Complete(const v1::CompleteTaskRequest& request) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(5));
    v1::CompleteTaskResponse response;
    return FromGrpc(stub_->CompleteTask(&context, request, &response));
  }

  Status Run(const v1::Lease& lease) {
    RF_ASSIGN_OR_RETURN(const v1::CompleteTaskRequest request, MakeSuccess(lease));
    return Complete(request);
  }

 private:
  std::unique_ptr<v1::WorkerService::Stub> stub_;
  ArtifactClient artifacts_;
  const std::string id_;
  const std::string incarnation_;
};

}  // namespace refinery::testing
