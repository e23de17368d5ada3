#include "server/api/job_service.h"

#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <charconv>
#include <random>

#include "common/digest.h"
#include "common/grpc_status.h"
#include "common/recipe.h"
#include "server/api/watch.h"
#include "server/store/artifacts.h"

namespace refinery::api {
namespace {

constexpr int32_t kDefaultPageSize = 50;
constexpr int32_t kMaxPageSize = 500;

// Runs `command` on the loop and answers with its status once what it did is durable.
template <typename Command>
grpc::ServerUnaryReactor* Answer(Coordinator* coordinator, grpc::CallbackServerContext* context, Command command) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  coordinator->Post([reactor, command = std::move(command)](Coordinator::Turn& turn) {
    const Status status = command(turn);
    turn.replies.push_back([reactor, status] { reactor->Finish(ToGrpc(status)); });
  });
  return reactor;
}

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
    return InvalidArgument("the recipe has ", given.ByteSizeLong(), " bytes; at most ", limits::kMaxRecipeBytes, " fit");
  }
  v1::Recipe recipe = given;
  FillDefaults(&recipe);
  RF_RETURN_IF_ERROR(CheckRecipe(recipe));
  return recipe;
}

Status CheckFiles(store::BlobStore& blobs, const google::protobuf::Map<std::string, std::string>& files) {
  for (const auto& [role, digest] : files) {
    if (!IsDigest(digest)) return InvalidArgument("files['", role, "'] is not a digest: '", digest.substr(0, 80), "'");
    const Status status = store::CheckComplete(blobs, digest).status();
    if (!status.ok()) return Annotate(status, Join("file '", role, "'"));
  }
  return absl::OkStatus();
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

}  // namespace

grpc::ServerUnaryReactor* JobServiceImpl::CreateJob(grpc::CallbackServerContext* context,
                                                    const v1::CreateJobRequest* request, v1::Job* response) {
  return Answer(coordinator_, context, [this, request, response](Coordinator::Turn& turn) -> Status {
    jobs::Core::NewJob job;
    RF_ASSIGN_OR_RETURN(*job.created.mutable_recipe(), CompleteRecipe(request->recipe()));
    RF_RETURN_IF_ERROR(CheckFiles(coordinator_->blobs(), request->files()));
    *job.created.mutable_files() = request->files();
    job.created.set_request_id(request->request_id());
    job.created.set_owner(request->owner());
    job.id = NewJobId(job.created.recipe());
    if (request->validate_only()) {
      RF_ASSIGN_OR_RETURN(const plan::Plan plan, plan::MakePlan(job.created.recipe(), {request->files().begin(),
                                                                                       request->files().end()}));
      *response->mutable_recipe() = job.created.recipe();
      response->set_tasks_total(static_cast<uint32_t>(plan.tasks.size()));
      return absl::OkStatus();
    }
    RF_ASSIGN_OR_RETURN(const std::string id, turn.core.CreateJob(job, turn.now, &turn.events));
    *response = jobs::ToProto(turn.core.state().jobs.at(id), true, turn.now);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* JobServiceImpl::GetJob(grpc::CallbackServerContext* context, const v1::GetJobRequest* request,
                                                 v1::Job* response) {
  return Answer(coordinator_, context, [request, response](Coordinator::Turn& turn) -> Status {
    RF_ASSIGN_OR_RETURN(const jobs::JobState* job, turn.core.FindJob(request->id()));
    *response = jobs::ToProto(*job, true, turn.now);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* JobServiceImpl::ListJobs(grpc::CallbackServerContext* context,
                                                   const v1::ListJobsRequest* request, v1::ListJobsResponse* response) {
  return Answer(coordinator_, context, [request, response](Coordinator::Turn& turn) -> Status {
    // Newest first. The token is the number of the oldest job shown, counted from the first ever: new jobs do not shift it.
    const std::vector<std::string>& order = turn.core.state().order;
    size_t end = order.size();
    const std::string& token = request->page_token();
    if (!token.empty()) {
      const auto [rest, error] = std::from_chars(token.data(), token.data() + token.size(), end);
      if (error != std::errc() || rest != token.data() + token.size() || end > order.size()) {
        return InvalidArgument("page_token was not made by this coordinator; start again without one");
      }
    }
    if (request->page_size() < 0) return InvalidArgument("page_size must not be negative, is ", request->page_size());
    const size_t size = request->page_size() == 0 ? kDefaultPageSize : std::min(request->page_size(), kMaxPageSize);
    for (; end > 0 && static_cast<size_t>(response->jobs_size()) < size; --end) {
      *response->add_jobs() = jobs::ToProto(turn.core.state().jobs.at(order[end - 1]), false, turn.now);
    }
    if (end > 0) response->set_next_page_token(Join(end));
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* JobServiceImpl::CancelJob(grpc::CallbackServerContext* context,
                                                    const v1::CancelJobRequest* request, v1::Job* response) {
  return Answer(coordinator_, context, [request, response](Coordinator::Turn& turn) -> Status {
    RF_RETURN_IF_ERROR(turn.core.CancelJob(request->id(), request->reason(), turn.now, &turn.events));
    RF_ASSIGN_OR_RETURN(const jobs::JobState* job, turn.core.FindJob(request->id()));
    *response = jobs::ToProto(*job, true, turn.now);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* JobServiceImpl::PlanJob(grpc::CallbackServerContext* context, const v1::PlanJobRequest* request,
                                                  v1::Plan* response) {
  return Answer(coordinator_, context, [request, response](Coordinator::Turn&) -> Status {
    RF_ASSIGN_OR_RETURN(const v1::Recipe recipe, CompleteRecipe(request->recipe()));
    RF_ASSIGN_OR_RETURN(const plan::Plan plan,
                        plan::MakePlan(recipe, {request->files().begin(), request->files().end()}));
    FillPlan(plan, response);
    return absl::OkStatus();
  });
}

grpc::ServerWriteReactor<v1::WatchJobResponse>* JobServiceImpl::WatchJob(grpc::CallbackServerContext*,
                                                                         const v1::WatchJobRequest* request) {
  return WatchStream::Start(std::make_shared<WatchStream>(coordinator_, request->id(), request->after_seq()));
}

grpc::ServerWriteReactor<v1::LogChunk>* JobServiceImpl::TailLogs(grpc::CallbackServerContext*,
                                                                 const v1::TailLogsRequest* request) {
  return TailStream::Start(
      std::make_shared<TailStream>(coordinator_, request->id(), request->path(), request->follow()));
}

grpc::ServerUnaryReactor* JobServiceImpl::ListWorkers(grpc::CallbackServerContext* context, const v1::ListWorkersRequest*,
                                                      v1::ListWorkersResponse* response) {
  return Answer(coordinator_, context, [this, response](Coordinator::Turn& turn) -> Status {
    for (v1::WorkerInfo& worker : coordinator_->fleet().List(turn.now.steady)) *response->add_workers() = std::move(worker);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* JobServiceImpl::GetVersion(grpc::CallbackServerContext* context, const v1::GetVersionRequest*,
                                                     v1::VersionInfo* response) {
  response->set_version(REFINERY_VERSION);
  response->set_grpc(grpc::Version());
  response->set_protocol(limits::kProtocolVersion);
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

}  // namespace refinery::api
