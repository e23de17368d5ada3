// server/api/job_service.h
//
// JobService (proto/refinery/v1/job_service.proto) over the coordinator. Handlers ask the gate, check their request, post a command
// and return; the answer follows the commit. They never block.

#pragma once

#include <string>
#include <string_view>

#include "refinery/v1/job_service.grpc.pb.h"
#include "server/api/coordinator.h"
#include "server/security/gate.h"

namespace refinery::api {

class JobServiceImpl final : public v1::JobService::CallbackService {
 public:
  // `page_key` as LoadPageKey gives it.
  JobServiceImpl(Coordinator* coordinator, security::Gate* gate, std::string page_key)
      : coordinator_(coordinator), gate_(gate), page_key_(std::move(page_key)) {}

  grpc::ServerUnaryReactor* CreateJob(grpc::CallbackServerContext* context, const v1::CreateJobRequest* request,
                                      v1::Job* response) override;
  grpc::ServerUnaryReactor* GetJob(grpc::CallbackServerContext* context, const v1::GetJobRequest* request,
                                   v1::Job* response) override;
  grpc::ServerUnaryReactor* ListJobs(grpc::CallbackServerContext* context, const v1::ListJobsRequest* request,
                                     v1::ListJobsResponse* response) override;
  grpc::ServerUnaryReactor* CancelJob(grpc::CallbackServerContext* context, const v1::CancelJobRequest* request,
                                      v1::Job* response) override;
  grpc::ServerUnaryReactor* KillJob(grpc::CallbackServerContext* context, const v1::ChangeJobRequest* request,
                                    v1::Job* response) override;
  grpc::ServerUnaryReactor* PauseJob(grpc::CallbackServerContext* context, const v1::ChangeJobRequest* request,
                                     v1::Job* response) override;
  grpc::ServerUnaryReactor* ResumeJob(grpc::CallbackServerContext* context, const v1::ChangeJobRequest* request,
                                      v1::Job* response) override;
  grpc::ServerUnaryReactor* RetryJob(grpc::CallbackServerContext* context, const v1::ChangeJobRequest* request,
                                     v1::Job* response) override;
  grpc::ServerUnaryReactor* UpdateJob(grpc::CallbackServerContext* context, const v1::UpdateJobRequest* request,
                                      v1::Job* response) override;
  grpc::ServerUnaryReactor* DiffJobs(grpc::CallbackServerContext* context, const v1::DiffJobsRequest* request,
                                     v1::JobDiff* response) override;
  grpc::ServerUnaryReactor* PlanJob(grpc::CallbackServerContext* context, const v1::PlanJobRequest* request,
                                    v1::Plan* response) override;
  grpc::ServerWriteReactor<v1::WatchJobResponse>* WatchJob(grpc::CallbackServerContext* context,
                                                           const v1::WatchJobRequest* request) override;
  grpc::ServerWriteReactor<v1::LogChunk>* TailLogs(grpc::CallbackServerContext* context,
                                                   const v1::TailLogsRequest* request) override;
  grpc::ServerUnaryReactor* ListWorkers(grpc::CallbackServerContext* context, const v1::ListWorkersRequest* request,
                                        v1::ListWorkersResponse* response) override;
  grpc::ServerUnaryReactor* GetVersion(grpc::CallbackServerContext* context, const v1::GetVersionRequest* request,
                                       v1::VersionInfo* response) override;

 private:
  Status Create(Coordinator::Turn& turn, security::Call& call, const v1::CreateJobRequest& request, v1::Job* response);
  // The frame of every change of a job: find it, check etag and request id, `check` whether it could be done, `apply` it.
  template <typename Request, typename Check, typename Apply>
  grpc::ServerUnaryReactor* Change(grpc::CallbackServerContext* context, std::string_view method, const Request* request,
                                   v1::Job* response, Check check, Apply apply);

  Coordinator* const coordinator_;
  security::Gate* const gate_;
  const std::string page_key_;
};

}  // namespace refinery::api
