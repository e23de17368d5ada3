#include "server/api/admin_service.h"

#include <spdlog/spdlog.h>

#include <algorithm>
#include <filesystem>

#include "common/error_details.h"
#include "server/api/answer.h"
#include "server/api/requests.h"
#include "server/jobs/policy.h"
#include "server/scheduler/schedule.h"
#include "server/store/backup.h"

namespace refinery::api {
namespace {

v1::Tenant ShowTenant(const jobs::State& state, const std::string& name, const std::map<std::string, scheduler::Usage>& usage) {
  v1::Tenant tenant;
  tenant.set_name(name);
  tenant.set_weight(1);
  if (const auto policy = state.tenants.find(name); policy != state.tenants.end()) {
    if (policy->second.weight() > 0) tenant.set_weight(policy->second.weight());
    tenant.set_max_tasks(policy->second.max_leases());
    tenant.set_max_devices(policy->second.max_devices());
    tenant.set_max_jobs(policy->second.max_jobs());
  }
  if (const auto used = usage.find(name); used != usage.end()) tenant.set_tasks_leased(used->second.leases);
  double device_seconds = 0;
  uint32_t ready = 0, active = 0;
  for (const auto& [id, job] : state.jobs) {
    if (job.tenant() != name) continue;
    device_seconds += job.device_seconds;
    if (jobs::IsTerminal(job.state)) continue;
    ++active;
    for (const auto& [kind, tasks] : job.ready) ready += static_cast<uint32_t>(tasks.size());
  }
  tenant.set_jobs(active);
  tenant.set_tasks_ready(ready);
  tenant.set_device_seconds(device_seconds);
  return tenant;
}

}  // namespace

AdminServiceImpl::AdminServiceImpl(Coordinator* coordinator, security::Gate* gate)
    : coordinator_(coordinator), gate_(gate), start_time_ms_(ReadClocks().unix_ms) {}

AdminServiceImpl::~AdminServiceImpl() {
  if (backup_.joinable()) backup_.join();
}

void AdminServiceImpl::Describe(const Coordinator::Turn& turn, v1::CoordinatorInfo* info) const {
  const jobs::State& state = turn.core.state();
  const Coordinator::Disk disk = coordinator_->disk();
  info->set_state(disk == Coordinator::Disk::kReadOnly ? "read_only" : coordinator_->held() ? "draining" : "serving");
  info->set_disk_state(disk == Coordinator::Disk::kReadOnly ? "read_only" : disk == Coordinator::Disk::kFull ? "full" : "ok");
  info->set_version(REFINERY_VERSION);
  info->set_start_time_ms(start_time_ms_);
  info->set_last_seq(state.last_seq);
  info->set_jobs(static_cast<uint32_t>(state.jobs.size()));
  info->set_jobs_running(static_cast<uint32_t>(state.active.size()));
  uint32_t ready = 0;
  for (const auto& [seq, id] : state.active) {
    for (const auto& [kind, tasks] : state.jobs.at(id).ready) ready += static_cast<uint32_t>(tasks.size());
  }
  info->set_tasks_ready(ready);
  info->set_tasks_leased(static_cast<uint32_t>(state.leases.size()));
  for (const v1::WorkerInfo& worker : coordinator_->fleet().List(turn.now.steady)) {
    if (worker.state() != "lost") info->set_workers(info->workers() + 1);
  }
  std::error_code error;
  const std::filesystem::space_info space = std::filesystem::space(coordinator_->options().state, error);
  if (!error) {
    info->set_disk_bytes(space.capacity);
    info->set_disk_free_bytes(space.available);
  }
  info->set_store_bytes(coordinator_->blobs().total_bytes());
  info->set_blobs(coordinator_->blobs().total_blobs());
  info->set_listen(facts_.listen);
  info->set_encrypted(facts_.encrypted);
  info->set_authenticated(gate_->authenticates());
}

grpc::ServerUnaryReactor* AdminServiceImpl::GetCoordinator(grpc::CallbackServerContext* context, const v1::GetCoordinatorRequest*,
                                                           v1::CoordinatorInfo* response) {
  return Answer(coordinator_, gate_, context, "/refinery.v1.AdminService/GetCoordinator",
                [this, response](Coordinator::Turn& turn, security::Call&) {
                  Describe(turn, response);
                  return absl::OkStatus();
                });
}

// Whether a drain was done before, by its request id. A durable call's id is not for a drain.
template <typename Request>
StatusOr<bool> AdminServiceImpl::WasDrained(const Coordinator::Turn& turn, security::Call& call, std::string_view method,
                                            const Request& request) {
  RF_RETURN_IF_ERROR(CheckRequestId(request.request_id()));
  call.set_request_id(request.request_id());
  const v1::RequestMark mark = MarkOf(call.principal().name, method, request);
  RF_RETURN_IF_ERROR(turn.core.WasDone(mark).status());
  return jobs::WasDone(drains_, mark);
}

template <typename Request>
void AdminServiceImpl::RememberDrain(const Coordinator::Turn& turn, const security::Call& call, std::string_view method,
                                     const Request& request) {
  const v1::RequestMark mark = MarkOf(call.principal().name, method, request);
  if (!mark.key().empty()) drains_.Add(mark.key(), mark.digest(), turn.now.unix_ms);
}

grpc::ServerUnaryReactor* AdminServiceImpl::DrainCoordinator(grpc::CallbackServerContext* context,
                                                             const v1::DrainCoordinatorRequest* request,
                                                             v1::CoordinatorInfo* response) {
  constexpr std::string_view kMethod = "/refinery.v1.AdminService/DrainCoordinator";
  return Answer(coordinator_, gate_, context, kMethod,
                [this, kMethod, request, response](Coordinator::Turn& turn, security::Call& call) -> Status {
                  RF_ASSIGN_OR_RETURN(const bool done, WasDrained(turn, call, kMethod, *request));
                  if (!done && !request->validate_only()) {
                    coordinator_->set_held(request->drain());
                    RememberDrain(turn, call, kMethod, *request);
                    spdlog::info("leases are {} by {}", request->drain() ? "held back" : "granted again", call.principal().name);
                  }
                  Describe(turn, response);
                  return absl::OkStatus();
                });
}

grpc::ServerUnaryReactor* AdminServiceImpl::DrainWorker(grpc::CallbackServerContext* context,
                                                        const v1::DrainWorkerRequest* request, v1::WorkerInfo* response) {
  constexpr std::string_view kMethod = "/refinery.v1.AdminService/DrainWorker";
  return Answer(coordinator_, gate_, context, kMethod,
                [this, kMethod, request, response](Coordinator::Turn& turn, security::Call& call) -> Status {
                  RF_ASSIGN_OR_RETURN(const bool done, WasDrained(turn, call, kMethod, *request));
                  call.set_resource(Join("workers/", request->worker().substr(0, 200)));
                  if (!done && !request->validate_only()) {
                    coordinator_->fleet().Drain(request->worker(), request->drain());
                    RememberDrain(turn, call, kMethod, *request);
                  }
                  for (const v1::WorkerInfo& worker : coordinator_->fleet().List(turn.now.steady)) {
                    if (worker.id() != request->worker()) continue;
                    *response = worker;
                    return absl::OkStatus();
                  }
                  return WithResource(WithReason(NotFound("there is no worker ", request->worker().substr(0, 200),
                                                          "; `refinery worker list` shows them"),
                                                 "WORKER_NOT_FOUND"),
                                      "worker", request->worker());
                });
}

grpc::ServerUnaryReactor* AdminServiceImpl::ListTenants(grpc::CallbackServerContext* context,
                                                        const v1::ListTenantsRequest* request,
                                                        v1::ListTenantsResponse* response) {
  constexpr int32_t kDefaultPageSize = 100, kMaxPageSize = 500;
  return Answer(coordinator_, gate_, context, "/refinery.v1.AdminService/ListTenants",
                [=](Coordinator::Turn& turn, security::Call& call) -> Status {
                  if (request->page_size() < 0) {
                    return WithField(InvalidArgument("page_size must not be negative"), "page_size");
                  }
                  const size_t size = request->page_size() == 0 ? kDefaultPageSize : std::min(request->page_size(), kMaxPageSize);
                  const jobs::State& state = turn.core.state();
                  std::set<std::string> names;
                  for (const auto& [name, policy] : state.tenants) names.insert(name);
                  for (const auto& [id, job] : state.jobs) names.insert(job.tenant());
                  const auto usage = scheduler::UsageOf(state);
                  // Sorted by name, so the last one shown is the place to go on from.
                  for (auto name = names.upper_bound(request->page_token()); name != names.end(); ++name) {
                    if (!call.principal().MaySee(*name)) continue;
                    if (static_cast<size_t>(response->tenants_size()) == size) {
                      response->set_next_page_token(response->tenants(response->tenants_size() - 1).name());
                      break;
                    }
                    *response->add_tenants() = ShowTenant(state, *name, usage);
                  }
                  return absl::OkStatus();
                });
}

grpc::ServerUnaryReactor* AdminServiceImpl::SetTenant(grpc::CallbackServerContext* context,
                                                      const v1::SetTenantRequest* request, v1::Tenant* response) {
  constexpr std::string_view kMethod = "/refinery.v1.AdminService/SetTenant";
  return Answer(coordinator_, gate_, context, kMethod,
                [this, kMethod, request, response](Coordinator::Turn& turn, security::Call& call) -> Status {
                  const std::string& name = request->tenant().name();
                  RF_RETURN_IF_ERROR(WithField(CheckName(name, "tenant.name"), "tenant.name"));
                  call.set_resource(Join("tenants/", name));
                  RF_RETURN_IF_ERROR(CheckRequestId(request->request_id()));
                  call.set_request_id(request->request_id());
                  const v1::RequestMark mark = MarkOf(call.principal().name, kMethod, *request);
                  RF_ASSIGN_OR_RETURN(const bool done, turn.core.WasDone(mark));
                  v1::TenantPolicy policy;
                  policy.set_tenant(name);
                  policy.set_weight(request->tenant().weight());
                  policy.set_max_leases(request->tenant().max_tasks());
                  policy.set_max_devices(request->tenant().max_devices());
                  policy.set_max_jobs(request->tenant().max_jobs());
                  RF_RETURN_IF_ERROR(jobs::CheckTenant(policy));
                  if (!done && !request->validate_only()) {
                    RF_RETURN_IF_ERROR(turn.core.Once(mark, turn.now, &turn.events, [&] {
                      return turn.core.SetTenant(policy, turn.now, &turn.events);
                    }));
                  }
                  *response = ShowTenant(turn.core.state(), name, scheduler::UsageOf(turn.core.state()));
                  return absl::OkStatus();
                });
}

grpc::ServerUnaryReactor* AdminServiceImpl::Backup(grpc::CallbackServerContext* context, const v1::BackupRequest* request,
                                                   v1::BackupResponse* response) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  auto call = gate_->Admit(*context, "/refinery.v1.AdminService/Backup");
  const Status status = [&]() -> Status {
    RF_RETURN_IF_ERROR(call.status());
    RF_RETURN_IF_ERROR(CheckRequestId(request->request_id()));
    (*call)->set_request_id(request->request_id());
    if (request->folder().empty() || request->folder().front() != '/') {
      return WithField(InvalidArgument("folder must be an absolute path on the coordinator's machine"), "folder");
    }
    (*call)->set_resource(request->folder().substr(0, 1000));
    std::lock_guard lock(mutex_);
    if (backing_up_) return WithRetryAfter(FailedPrecondition("a backup is being made already"), std::chrono::seconds(10));
    backing_up_ = !request->validate_only();
    if (!backing_up_) return absl::OkStatus();
    if (backup_.joinable()) backup_.join();  // it has ended
    backup_ = std::thread([this, reactor, request, response, call = *call] {
      const StatusOr<store::BackupInfo> info = store::Backup(coordinator_->options().state, request->folder());
      call->set_outcome(info.status());
      if (info.ok()) {
        response->set_folder(request->folder());
        response->set_last_seq(info->last_seq);
        response->set_blobs(info->blobs);
        response->set_bytes(info->bytes);
      }
      {
        std::lock_guard lock(mutex_);
        backing_up_ = false;
      }
      reactor->Finish(ToGrpc(info.status()));
    });
    return absl::OkStatus();
  }();
  if (call.ok() && !status.ok()) (*call)->set_outcome(status);
  if (!status.ok() || request->validate_only()) reactor->Finish(ToGrpc(status));
  return reactor;
}

}  // namespace refinery::api
