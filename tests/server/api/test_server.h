// tests/server/api/test_server.h
//
// A coordinator with its server on loopback and a state folder of its own, for tests that need nothing special of them.

#pragma once

#include <grpcpp/client_context.h>

#include <chrono>
#include <memory>
#include <string>

#include "common/artifact_client.h"
#include "common/files.h"
#include "common/grpc_status.h"
#include "refinery/v1/admin_service.grpc.pb.h"
#include "refinery/v1/job_service.grpc.pb.h"
#include "server/api/server.h"
#include "tests/server/jobs/tiny_job.h"
#include "tests/server/store/temp_folder.h"

namespace refinery::testing {

class TestServer {
 public:
  Status Start(api::ServerOptions options = {}) {
    RF_ASSIGN_OR_RETURN(coordinator_, api::Coordinator::Open({.state = state_.path(),
                                                              .long_poll = std::chrono::milliseconds(200),
                                                              .watch_heartbeat = std::chrono::milliseconds(200),
                                                              .retry_backoff = std::chrono::milliseconds(10),
                                                              .make_report = [](const report::ReportInput&) {
                                                                return report::Report{.markdown = "report"};
                                                              },
                                                              .disk_full = {},
                                                              .disk_read_only = {}}));
    RF_ASSIGN_OR_RETURN(server_, api::Server::Start(coordinator_.get(), options));
    return absl::OkStatus();
  }
  void Stop() {
    server_.reset();
    coordinator_.reset();
  }
  ~TestServer() { Stop(); }

  const std::string& address() const { return server_->address(); }
  const std::filesystem::path& state() const { return state_.path(); }
  api::Coordinator& coordinator() { return *coordinator_; }

 private:
  TempFolder state_;
  std::unique_ptr<api::Coordinator> coordinator_;
  std::unique_ptr<api::Server> server_;
};

// One caller: a channel with credentials, and each call as (request) -> response or error.
class Caller {
 public:
  Caller() = default;
  explicit Caller(std::shared_ptr<grpc::Channel> channel)
      : channel_(std::move(channel)), jobs_(v1::JobService::NewStub(channel_)), admin_(v1::AdminService::NewStub(channel_)) {}

  template <typename Response, typename Stub, typename Request>
  StatusOr<Response> Call(Stub& stub, grpc::Status (Stub::*method)(grpc::ClientContext*, const Request&, Response*),
                          const Request& request) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
    Response response;
    RF_RETURN_IF_ERROR(FromGrpc((stub.*method)(&context, request, &response)));
    return response;
  }

  StatusOr<v1::Job> Create(v1::CreateJobRequest request = {}) {
    if (!request.has_recipe()) *request.mutable_recipe() = TinyRecipe();
    for (const std::string& role : TinyFileRoles()) {
      TempFolder folder;
      RF_RETURN_IF_ERROR(WriteFileAtomically(folder.path() / "rows.jsonl", role));
      RF_ASSIGN_OR_RETURN(const v1::ArtifactRef ref, ArtifactClient(channel_).UploadFolder(folder.path(), role));
      (*request.mutable_files())[role] = ref.digest();
    }
    return Call(*jobs_, &v1::JobService::Stub::CreateJob, request);
  }
  StatusOr<v1::Job> Get(const std::string& id) {
    v1::GetJobRequest request;
    request.set_id(id);
    return Call(*jobs_, &v1::JobService::Stub::GetJob, request);
  }
  StatusOr<v1::ListJobsResponse> List(const v1::ListJobsRequest& request = {}) {
    return Call(*jobs_, &v1::JobService::Stub::ListJobs, request);
  }
  using Verb = grpc::Status (v1::JobService::Stub::*)(grpc::ClientContext*, const v1::ChangeJobRequest&, v1::Job*);
  StatusOr<v1::Job> Change(Verb verb, const v1::ChangeJobRequest& request) { return Call(*jobs_, verb, request); }
  StatusOr<v1::VersionInfo> Version() { return Call(*jobs_, &v1::JobService::Stub::GetVersion, v1::GetVersionRequest()); }

  std::shared_ptr<grpc::Channel> channel() const { return channel_; }
  v1::JobService::Stub& jobs() { return *jobs_; }
  v1::AdminService::Stub& admin() { return *admin_; }

 private:
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::JobService::Stub> jobs_;
  std::unique_ptr<v1::AdminService::Stub> admin_;
};

}  // namespace refinery::testing
