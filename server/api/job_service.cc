#include "server/api/job_service.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <random>

#include "common/digest.h"
#include "common/error_details.h"
#include "common/recipe.h"
#include "server/api/answer.h"
#include "server/api/diff.h"
#include "server/api/job_files.h"
#include "server/api/list.h"
#include "server/api/requests.h"
#include "server/api/visible.h"
#include "server/api/watch.h"
#include "server/jobs/policy.h"
#include "server/scheduler/schedule.h"

namespace refinery::api {
namespace {

constexpr size_t kMaxReasonBytes = 1000;

// "<recipe name>-<eight hex digits>"
std::string NewJobId(const v1::Recipe& recipe) {
  std::random_device random;
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string id = recipe.name().empty() ? "job" : recipe.name().substr(0, 40);
  std::replace_if(id.begin(), id.end(), [](unsigned char c) { return !std::isalnum(c) && c != '-'; }, '-');
  id += '-';
  for (int i = 0; i < 8; ++i) id += kDigits[random() % 16];
  return id;
}

StatusOr<v1::Recipe> CompleteRecipe(const v1::Recipe& given) {
  if (given.ByteSizeLong() > limits::kMaxRecipeBytes) {
    return WithField(InvalidArgument("the recipe has ", given.ByteSizeLong(), " bytes; at most ", limits::kMaxRecipeBytes, " fit"),
                     "recipe");
  }
  v1::Recipe recipe = given;
  FillDefaults(&recipe);
  const Status status = CheckRecipe(recipe);
  if (status.ok()) return recipe;
  // Its sentences begin with the field.
  const std::string message = Message(status);
  return WithField(status, Join("recipe.", message.substr(0, message.find_first_of(" :"))));
}

void FillPlan(const plan::Plan& plan, v1::Plan* response) {
  for (const plan::PlannedTask& task : plan.tasks) {
    v1::PlanTask* out = response->add_tasks();
    out->set_path(task.path);
    out->set_kind(task.kind);
    for (const std::string& need : task.needs) out->add_needs(need);
    out->set_summary(task.summary);
  }
  response->set_text(plan::PlanText(plan));
}

// The caller's tenant unless he may name another.
Status SettleTenant(const security::Principal& principal, v1::JobPolicy* policy) {
  std::string tenant = policy->tenant().empty() ? principal.tenant : policy->tenant();
  if (tenant.empty()) tenant = kDefaultTenant;
  RF_RETURN_IF_ERROR(WithField(CheckName(tenant, "policy.tenant"), "policy.tenant"));
  if (!principal.MaySee(tenant)) {
    return WithReason(absl::PermissionDeniedError(View(Join(principal.name, " may not create jobs of tenant ", tenant))),
                      "OTHER_TENANT");
  }
  policy->set_tenant(tenant == kDefaultTenant ? "" : tenant);
  return absl::OkStatus();
}

Status CheckReason(const std::string& reason) {
  if (reason.size() <= kMaxReasonBytes) return absl::OkStatus();
  return WithField(InvalidArgument("reason has ", reason.size(), " bytes; at most ", kMaxReasonBytes), "reason");
}

// What the core would say, for validate_only.
Status CheckPause(const jobs::State&, const jobs::JobState& job) { return jobs::CheckPause(job); }
Status CheckResume(const jobs::State&, const jobs::JobState& job) { return jobs::CheckResume(job); }
Status CheckRetry(const jobs::State& state, const jobs::JobState& job) {
  RF_RETURN_IF_ERROR(jobs::CheckRetry(job));
  return jobs::IsTerminal(job.state) ? jobs::CheckJobQuota(state, job.created.policy()) : absl::OkStatus();
}
Status CheckNothing(const jobs::State&, const jobs::JobState&) { return absl::OkStatus(); }

// Why the first tasks that wait do so: the scheduler and the fleet know more than the state of the job alone.
void ExplainWaits(Coordinator& coordinator, const jobs::JobState& job, const jobs::Now& now, v1::Job* shown) {
  constexpr int kMaxExplained = 200;
  if (jobs::IsTerminal(job.state)) return;
  const std::vector<scheduler::Worker> workers = coordinator.fleet().Workers(now.steady);
  const Status disk = coordinator.CheckDisk(Coordinator::Disk::kOk);
  const std::string held = !disk.ok()           ? Message(disk)
                           : coordinator.held() ? "the coordinator drains; `refinery admin drain --off` lets it grant leases again"
                                                : "";
  int explained = 0;
  for (int i = 0; i < shown->tasks_size() && explained < kMaxExplained; ++i) {
    v1::Task* task = shown->mutable_tasks(i);
    if (task->state() != v1::Task::READY && task->state() != v1::Task::BLOCKED) continue;
    scheduler::Wait wait = scheduler::Explain(coordinator.core(), job, static_cast<size_t>(i), workers, now);
    if (task->state() == v1::Task::READY && !held.empty()) wait = {v1::WAIT_DRAINING, held};
    if (wait.reason == v1::WAIT_REASON_UNSPECIFIED) continue;
    task->set_reason_code(v1::WaitReason_Name(wait.reason));
    task->set_why(wait.text);
    ++explained;
  }
}

}  // namespace

Status JobServiceImpl::Create(Coordinator::Turn& turn, security::Call& call, const v1::CreateJobRequest& request,
                              v1::Job* response) {
  RF_RETURN_IF_ERROR(CheckRequestId(request.request_id()));
  if (!request.job_id().empty()) RF_RETURN_IF_ERROR(WithField(CheckName(request.job_id(), "job_id"), "job_id"));
  jobs::Core::NewJob job;
  v1::JobCreated& created = job.created;
  RF_ASSIGN_OR_RETURN(*created.mutable_recipe(), CompleteRecipe(request.recipe()));
  RF_RETURN_IF_ERROR(CheckFiles(turn.core.state(), *coordinator_, call.principal().tenant, request.files()));
  if (request.has_policy()) *created.mutable_policy() = request.policy();
  RF_RETURN_IF_ERROR(SettleTenant(call.principal(), created.mutable_policy()));
  RF_RETURN_IF_ERROR(jobs::CheckPolicy(created.policy()));
  if (created.policy().ByteSizeLong() == 0) created.clear_policy();
  *created.mutable_files() = request.files();
  // Request ids of different tenants have nothing to do with each other.
  const std::string& tenant = created.policy().tenant();
  const bool scoped = !tenant.empty() && !request.request_id().empty();
  created.set_request_id(scoped ? Join(tenant, ":", request.request_id()) : request.request_id());
  created.set_owner(gate_->authenticates() && request.owner().empty() ? call.principal().name : request.owner().substr(0, 200));
  job.id = request.job_id().empty() ? NewJobId(created.recipe()) : request.job_id();
  // The core itself compares what is created; here an id of another kind of call is refused.
  const v1::RequestMark mark = MakeMark(call.principal().name, request.request_id(), "CreateJob", v1::CreateJobRequest());
  RF_ASSIGN_OR_RETURN(const bool known, turn.core.WasDone(mark));
  if (request.validate_only()) {
    RF_ASSIGN_OR_RETURN(const plan::Plan plan,
                        plan::MakePlan(created.recipe(), {request.files().begin(), request.files().end()}));
    RF_RETURN_IF_ERROR(jobs::CheckJobQuota(turn.core.state(), created.policy()));
    *response->mutable_recipe() = created.recipe();
    response->set_tasks_total(static_cast<uint32_t>(plan.tasks.size()));
    return absl::OkStatus();
  }
  RF_RETURN_IF_ERROR(coordinator_->CheckDisk(Coordinator::Disk::kOk));
  StatusOr<std::string> id;
  const Status created_now = turn.core.Once(known ? v1::RequestMark() : mark, turn.now, &turn.events, [&] {
    id = turn.core.CreateJob(job, turn.now, &turn.events);
    return id.status();
  });
  RF_CHECK(created_now == id.status());
  if (absl::IsAlreadyExists(id.status())) return WithResource(id.status(), "job", job.id);
  if (!id.ok()) return id.status();
  const jobs::JobState& state = turn.core.state().jobs.at(*id);
  call.set_resource(NameOf(state));
  *response = ShowJob(state, true, turn.now);
  return absl::OkStatus();
}

grpc::ServerUnaryReactor* JobServiceImpl::CreateJob(grpc::CallbackServerContext* context,
                                                    const v1::CreateJobRequest* request, v1::Job* response) {
  return Answer(coordinator_, gate_, context, "/refinery.v1.JobService/CreateJob",
                [this, request, response](Coordinator::Turn& turn, security::Call& call) {
                  call.set_request_id(request->request_id().substr(0, 64));
                  return Create(turn, call, *request, response);
                });
}

grpc::ServerUnaryReactor* JobServiceImpl::GetJob(grpc::CallbackServerContext* context, const v1::GetJobRequest* request,
                                                 v1::Job* response) {
  return Answer(coordinator_, gate_, context, "/refinery.v1.JobService/GetJob",
                [this, request, response](Coordinator::Turn& turn, security::Call& call) -> Status {
                  RF_ASSIGN_OR_RETURN(const jobs::JobState* job,
                                      FindJob(turn.core.state(), call.principal(), request->id()));
                  *response = ShowJob(*job, true, turn.now);
                  ExplainWaits(*coordinator_, *job, turn.now, response);
                  return absl::OkStatus();
                });
}

grpc::ServerUnaryReactor* JobServiceImpl::ListJobs(grpc::CallbackServerContext* context,
                                                   const v1::ListJobsRequest* request, v1::ListJobsResponse* response) {
  return Answer(coordinator_, gate_, context, "/refinery.v1.JobService/ListJobs",
                [this, request, response](Coordinator::Turn& turn, security::Call& call) {
                  return api::ListJobs(turn.core.state(), call.principal(), *request, page_key_, turn.now, response);
                });
}

template <typename Request, typename Check, typename Apply>
grpc::ServerUnaryReactor* JobServiceImpl::Change(grpc::CallbackServerContext* context, std::string_view method,
                                                 const Request* request, v1::Job* response, Check check, Apply apply) {
  return Answer(
      coordinator_, gate_, context, method,
      [method, request, response, check, apply](Coordinator::Turn& turn, security::Call& call) -> Status {
        RF_RETURN_IF_ERROR(CheckRequestId(request->request_id()));
        call.set_request_id(request->request_id());
        RF_ASSIGN_OR_RETURN(const jobs::JobState* job, FindJob(turn.core.state(), call.principal(), request->id()));
        call.set_resource(NameOf(*job));
        const std::string id = job->id;
        const v1::RequestMark mark = MarkOf(call.principal().name, method, *request);
        RF_ASSIGN_OR_RETURN(const bool done, turn.core.WasDone(mark));
        if (!done) {
          if (!request->etag().empty() && request->etag() != EtagOf(*job)) {
            return WithReason(Aborted("job ", id, " has changed since you read it (etag ", EtagOf(*job), "); read it again"),
                              "ETAG_MISMATCH");
          }
          RF_RETURN_IF_ERROR(check(turn.core.state(), *job));
          if (!request->validate_only()) {
            RF_RETURN_IF_ERROR(turn.core.Once(mark, turn.now, &turn.events, [&] { return apply(turn, id); }));
          }
        }
        *response = ShowJob(turn.core.state().jobs.at(id), true, turn.now);
        return absl::OkStatus();
      });
}

grpc::ServerUnaryReactor* JobServiceImpl::CancelJob(grpc::CallbackServerContext* context,
                                                    const v1::CancelJobRequest* request, v1::Job* response) {
  return Change(context, "/refinery.v1.JobService/CancelJob", request, response, CheckNothing,
                [request](Coordinator::Turn& turn, const std::string& id) -> Status {
                  RF_RETURN_IF_ERROR(CheckReason(request->reason()));
                  return turn.core.CancelJob(id, request->reason(), turn.now, &turn.events);
                });
}

grpc::ServerUnaryReactor* JobServiceImpl::KillJob(grpc::CallbackServerContext* context, const v1::ChangeJobRequest* request,
                                                  v1::Job* response) {
  return Change(context, "/refinery.v1.JobService/KillJob", request, response, CheckNothing,
                [request](Coordinator::Turn& turn, const std::string& id) -> Status {
                  RF_RETURN_IF_ERROR(CheckReason(request->reason()));
                  return turn.core.KillJob(id, request->reason(), turn.now, &turn.events);
                });
}

grpc::ServerUnaryReactor* JobServiceImpl::PauseJob(grpc::CallbackServerContext* context, const v1::ChangeJobRequest* request,
                                                   v1::Job* response) {
  return Change(context, "/refinery.v1.JobService/PauseJob", request, response, CheckPause,
                [request](Coordinator::Turn& turn, const std::string& id) -> Status {
                  RF_RETURN_IF_ERROR(CheckReason(request->reason()));
                  return turn.core.PauseJob(id, request->reason(), turn.now, &turn.events);
                });
}

grpc::ServerUnaryReactor* JobServiceImpl::ResumeJob(grpc::CallbackServerContext* context,
                                                    const v1::ChangeJobRequest* request, v1::Job* response) {
  return Change(context, "/refinery.v1.JobService/ResumeJob", request, response, CheckResume,
                [request](Coordinator::Turn& turn, const std::string& id) -> Status {
                  RF_RETURN_IF_ERROR(CheckReason(request->reason()));
                  return turn.core.ResumeJob(id, request->reason(), turn.now, &turn.events);
                });
}

grpc::ServerUnaryReactor* JobServiceImpl::RetryJob(grpc::CallbackServerContext* context, const v1::ChangeJobRequest* request,
                                                   v1::Job* response) {
  return Change(context, "/refinery.v1.JobService/RetryJob", request, response, CheckRetry,
                [request](Coordinator::Turn& turn, const std::string& id) -> Status {
                  RF_RETURN_IF_ERROR(CheckReason(request->reason()));
                  return turn.core.RetryJob(id, request->reason(), turn.now, &turn.events);
                });
}

grpc::ServerUnaryReactor* JobServiceImpl::UpdateJob(grpc::CallbackServerContext* context, const v1::UpdateJobRequest* request,
                                                    v1::Job* response) {
  const auto check = [request](const jobs::State&, const jobs::JobState& job) -> Status {
    if (jobs::IsTerminal(job.state)) return FailedPrecondition("job ", job.id, " has ended; its policy means nothing any more");
    const std::string& tenant = request->policy().tenant();
    if (!tenant.empty() && tenant != TenantOf(job)) {
      return WithField(InvalidArgument("a job stays with its tenant, here ", TenantOf(job)), "policy.tenant");
    }
    return jobs::CheckPolicy(request->policy());
  };
  return Change(context, "/refinery.v1.JobService/UpdateJob", request, response, check,
                [request](Coordinator::Turn& turn, const std::string& id) -> Status {
                  v1::JobPolicy policy = request->policy();
                  policy.set_tenant(turn.core.state().jobs.at(id).created.policy().tenant());
                  return turn.core.SetPolicy(id, policy, turn.now, &turn.events);
                });
}

grpc::ServerUnaryReactor* JobServiceImpl::DiffJobs(grpc::CallbackServerContext* context, const v1::DiffJobsRequest* request,
                                                   v1::JobDiff* response) {
  return Answer(coordinator_, gate_, context, "/refinery.v1.JobService/DiffJobs",
                [request, response](Coordinator::Turn& turn, security::Call& call) -> Status {
                  const jobs::State& state = turn.core.state();
                  RF_ASSIGN_OR_RETURN(const jobs::JobState* before, FindJob(state, call.principal(), request->before()));
                  RF_ASSIGN_OR_RETURN(const jobs::JobState* after, FindJob(state, call.principal(), request->after()));
                  *response = api::DiffJobs(*before, *after);
                  return absl::OkStatus();
                });
}

grpc::ServerUnaryReactor* JobServiceImpl::PlanJob(grpc::CallbackServerContext* context, const v1::PlanJobRequest* request,
                                                  v1::Plan* response) {
  return Answer(coordinator_, gate_, context, "/refinery.v1.JobService/PlanJob",
                [request, response](Coordinator::Turn&, security::Call&) -> Status {
                  RF_ASSIGN_OR_RETURN(const v1::Recipe recipe, CompleteRecipe(request->recipe()));
                  RF_ASSIGN_OR_RETURN(const plan::Plan plan,
                                      plan::MakePlan(recipe, {request->files().begin(), request->files().end()}));
                  FillPlan(plan, response);
                  return absl::OkStatus();
                });
}

grpc::ServerWriteReactor<v1::WatchJobResponse>* JobServiceImpl::WatchJob(grpc::CallbackServerContext* context,
                                                                         const v1::WatchJobRequest* request) {
  auto call = gate_->Admit(*context, "/refinery.v1.JobService/WatchJob");
  if (!call.ok()) return new RefusedStream<v1::WatchJobResponse>(call.status());
  return WatchStream::Start(std::make_shared<WatchStream>(coordinator_, *std::move(call), request->id(), request->after_seq()));
}

grpc::ServerWriteReactor<v1::LogChunk>* JobServiceImpl::TailLogs(grpc::CallbackServerContext* context,
                                                                 const v1::TailLogsRequest* request) {
  auto call = gate_->Admit(*context, "/refinery.v1.JobService/TailLogs");
  if (!call.ok()) return new RefusedStream<v1::LogChunk>(call.status());
  return TailStream::Start(
      std::make_shared<TailStream>(coordinator_, *std::move(call), request->id(), request->path(), request->follow()));
}

grpc::ServerUnaryReactor* JobServiceImpl::ListWorkers(grpc::CallbackServerContext* context, const v1::ListWorkersRequest*,
                                                      v1::ListWorkersResponse* response) {
  return Answer(coordinator_, gate_, context, "/refinery.v1.JobService/ListWorkers",
                [this, response](Coordinator::Turn& turn, security::Call& call) {
                  const auto& jobs = turn.core.state().jobs;
                  for (v1::WorkerInfo& worker : coordinator_->fleet().List(turn.now.steady)) {
                    // What runs for others is not this caller's business.
                    std::vector<std::string> visible;
                    for (const std::string& task : worker.running()) {
                      const auto job = jobs.find(task.substr(0, task.find('/')));
                      if (job != jobs.end() && call.principal().MaySee(TenantOf(job->second))) visible.push_back(task);
                    }
                    worker.mutable_running()->Assign(visible.begin(), visible.end());
                    if (!call.principal().tenant.empty()) {  // nor what others have, nor where the machines are reached
                      worker.clear_cached();
                      worker.clear_address();
                      worker.clear_ports();
                    }
                    *response->add_workers() = std::move(worker);
                  }
                  return absl::OkStatus();
                });
}

grpc::ServerUnaryReactor* JobServiceImpl::GetVersion(grpc::CallbackServerContext* context, const v1::GetVersionRequest*,
                                                     v1::VersionInfo* response) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  const StatusOr<std::shared_ptr<security::Call>> call = gate_->Admit(*context, "/refinery.v1.JobService/GetVersion");
  if (!call.ok()) {
    reactor->Finish(ToGrpc(call.status()));
    return reactor;
  }
  response->set_version(REFINERY_VERSION);
  response->set_grpc(grpc::Version());
  response->set_protocol(limits::kProtocolVersion);
  response->set_time_ms(ReadClocks().unix_ms);
  response->set_caller((*call)->principal().name);
  response->set_role(RoleName((*call)->principal().role));
  response->set_tenant((*call)->principal().tenant);
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

}  // namespace refinery::api
