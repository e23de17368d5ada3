#include "server/api/worker_service.h"

#include <spdlog/spdlog.h>

#include <algorithm>

#include "common/digest.h"
#include "common/grpc_status.h"
#include "server/store/artifacts.h"

namespace refinery::api {
namespace {

constexpr Milliseconds kDeadlineMargin{500};  // a long poll is answered this long before its caller gives up
constexpr size_t kMaxIdBytes = 200;

// A Synchronize call. Deletes itself when gRPC has let go of it.
class PollReactor final : public grpc::ServerUnaryReactor {
 public:
  PollReactor(Coordinator* coordinator, std::shared_ptr<security::Call> call, const v1::SynchronizeResponse* response)
      : coordinator_(coordinator), call_(std::move(call)), response_(response) {}

  // The caller went away: what the poll was granted meanwhile is not lost, its lease just runs out.
  void OnCancel() override {
    coordinator_->Post([coordinator = coordinator_, response = response_](Coordinator::Turn& turn) {
      const std::function<void(const Status&)> answer = coordinator->fleet().Close(response, turn.now.steady);
      if (answer) turn.replies.push_back(answer);
    });
  }
  void OnDone() override { delete this; }

 private:
  Coordinator* const coordinator_;
  const std::shared_ptr<security::Call> call_;
  const v1::SynchronizeResponse* const response_;
};

grpc::ServerUnaryReactor* Refuse(grpc::CallbackServerContext* context, const Status& status) {
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpc(status));
  return reactor;
}

Milliseconds TimeLeft(const grpc::CallbackServerContext& context) {
  const auto deadline = context.deadline();
  const auto now = std::chrono::system_clock::now();
  if (deadline > now + std::chrono::hours(1)) return std::chrono::hours(1);
  return std::chrono::duration_cast<Milliseconds>(deadline - now);
}

Status CheckSynchronize(const v1::SynchronizeRequest& request) {
  const std::string& id = request.worker().id();
  if (id.empty() || id.size() > kMaxIdBytes) return InvalidArgument("worker.id must have 1 to ", kMaxIdBytes, " characters");
  if (request.worker().labels_size() > static_cast<int>(limits::kMaxWorkerLabels) ||
      request.worker().cached_size() > static_cast<int>(limits::kMaxReportedArtifacts)) {
    return InvalidArgument("worker has ", request.worker().labels_size(), " labels and ", request.worker().cached_size(),
                           " cached artifacts; at most ", limits::kMaxWorkerLabels, " and ", limits::kMaxReportedArtifacts,
                           " are possible");
  }
  if (request.incarnation().empty()) return InvalidArgument("incarnation is missing; the agent makes one at its start");
  return absl::OkStatus();
}

// Tokens and loss for the metrics, logs to their files; before the core takes the request in, which replaces the progress.
// False when there was no room for a log: the worker has to send it again.
bool TakeProgress(Coordinator& coordinator, const v1::SynchronizeRequest& request) {
  bool kept = true;
  for (const v1::RunningAttempt& running : request.running()) {
    const jobs::TaskState* task = coordinator.core().AttemptOf(running.lease());
    if (task == nullptr || task->state != v1::Task::LEASED) continue;
    const jobs::JobState& job = coordinator.core().state().jobs.at(running.lease().job());
    const v1::TaskKind kind = job.plan.tasks[job.index.at(running.lease().path())].kind;
    if (running.has_progress()) coordinator.metrics().OnProgress(kind, task->progress, running.progress());
    if (running.log().empty()) continue;
    const Status status = coordinator.logs().Append(job.id, running.lease().path(), task->attempt, running.log_offset(),
                                                    running.log());
    if (status.ok()) continue;
    kept &= !absl::IsResourceExhausted(status);
    spdlog::warn("log of {}/{}: {}", job.id, running.lease().path(), Message(status));
  }
  return kept;
}

}  // namespace

grpc::ServerUnaryReactor* WorkerServiceImpl::Synchronize(grpc::CallbackServerContext* context,
                                                         const v1::SynchronizeRequest* request,
                                                         v1::SynchronizeResponse* response) {
  auto call = gate_->Admit(*context, "/refinery.v1.WorkerService/Synchronize");
  if (!call.ok()) return Refuse(context, call.status());
  auto* reactor = new PollReactor(coordinator_, *std::move(call), response);
  const Milliseconds left = TimeLeft(*context) - kDeadlineMargin;
  coordinator_->Post([this, reactor, request, response, left](Coordinator::Turn& turn) {
    const Status status = CheckSynchronize(*request);
    if (!status.ok()) return turn.replies.push_back([reactor, status](const Status&) { reactor->Finish(ToGrpc(status)); });
    // The poll of a later message must stay open, and nothing be granted into this one, whose caller has gone on.
    const bool stale = turn.core.IsStale(*request);
    const bool kept = !stale && TakeProgress(*coordinator_, *request);
    const bool known = stale || coordinator_->fleet().Seen(*request, turn.now.steady);
    response->set_tell_worker(!known);
    jobs::Core::Report report = turn.core.Synchronize(*request, turn.now, &turn.events);
    response->mutable_cancel()->Swap(&report.cancel);
    response->set_repeat_report(report.repeat || !kept);
    response->set_not_renewed(report.not_renewed);
    const CoordinatorOptions& options = coordinator_->options();
    response->set_lease_ttl_ms(static_cast<uint32_t>(options.lease_ttl.count()));
    response->set_next_synchronize_ms(static_cast<uint32_t>(limits::SynchronizeInterval(options.lease_ttl).count()));
    if (stale) {
      turn.replies.push_back([reactor](const Status& committed) { reactor->Finish(ToGrpc(committed)); });
      return;
    }
    // A worker that has nothing and wants nothing only asks whether we are there.
    const bool is_idle = known && request->running().empty() && (request->free_slots() > 0 || request->worker().state() == "draining");
    // Its answer may bring a lease, whose life the worker counts from when it asked: a poll must end well before that.
    const Milliseconds longest = std::min({options.long_poll, options.lease_ttl * 2 / 3, left});
    const Milliseconds wait = is_idle ? std::max(Milliseconds{0}, longest) : Milliseconds{0};
    const auto superseded = coordinator_->fleet().Open({.worker = request->worker().id(),
                                                        .incarnation = request->incarnation(),
                                                        .free_slots = report.not_renewed ? 0 : request->free_slots(),  // it would take a grant for late
                                                        .deadline = turn.now.steady + wait,
                                                        .response = response,
                                                        .answer = [reactor](const Status& committed) {
                                                          reactor->Finish(ToGrpc(committed));
                                                        }});
    if (superseded) turn.replies.push_back(superseded);
  });
  return reactor;
}

grpc::ServerUnaryReactor* WorkerServiceImpl::CompleteTask(grpc::CallbackServerContext* context,
                                                          const v1::CompleteTaskRequest* request,
                                                          v1::CompleteTaskResponse*) {
  auto call = gate_->Admit(*context, "/refinery.v1.WorkerService/CompleteTask");
  if (!call.ok()) return Refuse(context, call.status());
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  // The files are looked at here, so that the loop need not; what is looked at is not collected from then on.
  StatusOr<uint64_t> size = 0;
  if (request->has_success()) size = store::CheckComplete(coordinator_->blobs(), request->success().output().digest());
  coordinator_->Post([this, reactor, request, size, call = *std::move(call)](Coordinator::Turn& turn) {
    const Status status = [&]() -> Status {
      const jobs::TaskState* task = turn.core.AttemptOf(request->lease());
      if (task == nullptr || task->state != v1::Task::LEASED) return turn.core.Complete(*request, turn.now, &turn.events);
      if (!request->log().empty()) {
        const Status logged = coordinator_->logs().Append(request->lease().job(), request->lease().path(), task->attempt,
                                                          request->log_offset(), request->log());
        if (!logged.ok()) spdlog::warn("log of {}/{}: {}", request->lease().job(), request->lease().path(), Message(logged));
      }
      if (!request->has_success()) return turn.core.Complete(*request, turn.now, &turn.events);
      if (!size.ok()) return size.status();
      RF_RETURN_IF_ERROR(coordinator_->CheckDisk(Coordinator::Disk::kFull));
      v1::CompleteTaskRequest checked = *request;
      checked.mutable_success()->mutable_output()->set_size(*size);
      return turn.core.Complete(checked, turn.now, &turn.events);
    }();
    turn.replies.push_back([reactor, status, call](const Status& committed) {
      reactor->Finish(ToGrpc(committed.ok() ? status : committed));
    });
  });
  return reactor;
}

grpc::ServerUnaryReactor* WorkerServiceImpl::CommitCheckpoint(grpc::CallbackServerContext* context,
                                                              const v1::CommitCheckpointRequest* request,
                                                              v1::CommitCheckpointResponse*) {
  auto call = gate_->Admit(*context, "/refinery.v1.WorkerService/CommitCheckpoint");
  if (!call.ok()) return Refuse(context, call.status());
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  const Status complete = store::CheckComplete(coordinator_->blobs(), request->checkpoint().digest()).status();
  coordinator_->Post([this, reactor, request, complete, call = *std::move(call)](Coordinator::Turn& turn) {
    const Status status = [&]() -> Status {
      const jobs::TaskState* task = turn.core.AttemptOf(request->lease());
      if (task != nullptr && task->state == v1::Task::LEASED) {
        RF_RETURN_IF_ERROR(complete);
        RF_RETURN_IF_ERROR(coordinator_->CheckDisk(Coordinator::Disk::kFull));
      }
      return turn.core.CommitCheckpoint(*request, turn.now, &turn.events);
    }();
    turn.replies.push_back([reactor, status, call](const Status& committed) {
      reactor->Finish(ToGrpc(committed.ok() ? status : committed));
    });
  });
  return reactor;
}

}  // namespace refinery::api
