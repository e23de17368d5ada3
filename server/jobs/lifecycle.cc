// The part of the core that carries out what people ask of a whole job or tenant.

#include <algorithm>

#include "common/error_details.h"
#include "server/jobs/core.h"
#include "server/jobs/policy.h"
#include "server/jobs/text.h"

namespace refinery::jobs {

StatusOr<bool> WasDone(const AnsweredRequests& answered, const v1::RequestMark& mark) {
  const AnsweredRequests::Entry* known = mark.key().empty() ? nullptr : answered.Find(mark.key());
  if (known == nullptr) return false;
  if (known->digest == mark.digest()) return true;
  return WithField(WithReason(AlreadyExists("request id ", mark.key().substr(mark.key().rfind('/') + 1),
                                            " was already used for another call; use a new one"),
                              "REQUEST_ID_REUSED"),
                   "request_id");
}

Status Core::Once(const v1::RequestMark& mark, const Now& now, Events* events, const std::function<Status()>& change) {
  RF_ASSIGN_OR_RETURN(const bool done, WasDone(mark));
  if (done) return absl::OkStatus();
  if (!mark.key().empty()) RF_RETURN_IF_ERROR(read_only_);
  mark_ = mark;
  const Status status = change();
  if (status.ok() && !mark_.key().empty()) {  // it changed nothing; that it was answered must last all the same
    v1::Event event;
    event.mutable_request_answered();
    Emit("", std::move(event), now, events);
  }
  mark_.Clear();
  return status;
}

Status Core::CancelJob(const std::string& id, const std::string& reason, const Now& now, Events* events) {
  RF_ASSIGN_OR_RETURN(const JobState* job, FindJob(id));
  if (IsTerminal(job->state) || job->state == v1::Job::CANCELLING) return absl::OkStatus();
  RF_RETURN_IF_ERROR(read_only_);
  const std::string full_id = job->id;
  v1::Event event;
  event.mutable_job_cancel_requested()->set_reason(Cut(reason.empty() ? "cancelled by the user" : reason));
  Emit(full_id, std::move(event), now, events);
  Advance(full_id, now, events);
  return absl::OkStatus();
}

Status Core::KillJob(const std::string& id, const std::string& reason, const Now& now, Events* events) {
  RF_ASSIGN_OR_RETURN(const JobState* job, FindJob(id));
  if (IsTerminal(job->state)) return absl::OkStatus();
  RF_RETURN_IF_ERROR(read_only_);
  const std::string full_id = job->id;
  v1::Event event;
  event.mutable_job_cancel_requested()->set_reason(Cut(reason.empty() ? "killed by the user" : reason));
  event.mutable_job_cancel_requested()->set_kill(true);
  Emit(full_id, std::move(event), now, events);
  EmitJobFinished(*job, v1::JobFinished::CANCELLED, job->reason, now, events);
  return absl::OkStatus();
}

Status Core::PauseJob(const std::string& id, const std::string& reason, const Now& now, Events* events) {
  RF_ASSIGN_OR_RETURN(const JobState* found, FindJob(id));
  JobState& job = Job(found->id);
  if (job.state == v1::Job::PAUSED) return absl::OkStatus();
  RF_RETURN_IF_ERROR(CheckPause(job));
  RF_RETURN_IF_ERROR(read_only_);
  v1::Event event;
  event.mutable_job_paused()->set_reason(Cut(reason.empty() ? "paused by the user" : reason));
  Emit(job.id, std::move(event), now, events);
  for (const size_t i : job.leased) {
    TaskState& task = job.tasks[i];
    task.release_at = now.steady + options_.pause_grace;
    task.release_reason = "the job is paused";
  }
  next_scan_ = std::min(next_scan_, now.steady + options_.pause_grace);
  return absl::OkStatus();
}

Status Core::ResumeJob(const std::string& id, const std::string& reason, const Now& now, Events* events) {
  RF_ASSIGN_OR_RETURN(const JobState* found, FindJob(id));
  JobState& job = Job(found->id);
  if (job.state == v1::Job::PENDING || job.state == v1::Job::RUNNING) return absl::OkStatus();
  RF_RETURN_IF_ERROR(CheckResume(job));
  RF_RETURN_IF_ERROR(read_only_);
  v1::Event event;
  event.mutable_job_resumed()->set_reason(Cut(reason));
  event.mutable_job_resumed()->set_paused_ms(static_cast<uint64_t>(std::max<int64_t>(0, now.unix_ms - job.paused_time_ms)));
  Emit(job.id, std::move(event), now, events);
  for (const size_t i : job.leased) job.tasks[i].release_at = std::chrono::milliseconds(-1);
  Advance(job.id, now, events);
  return absl::OkStatus();
}

Status Core::RetryJob(const std::string& id, const std::string& reason, const Now& now, Events* events) {
  RF_ASSIGN_OR_RETURN(const JobState* job, FindJob(id));
  RF_RETURN_IF_ERROR(CheckRetry(*job));
  if (!IsTerminal(job->state)) return absl::OkStatus();
  RF_RETURN_IF_ERROR(CheckJobQuota(state_, job->created.policy()));
  RF_RETURN_IF_ERROR(read_only_);
  const std::string full_id = job->id;
  v1::Event event;
  event.mutable_job_retried()->set_reason(Cut(reason));
  Emit(full_id, std::move(event), now, events);
  for (TaskState& task : Job(full_id).tasks) task.not_before = now.steady;  // the user waits, no need for a pause
  Advance(full_id, now, events);
  return absl::OkStatus();
}

Status Core::SetPolicy(const std::string& id, const v1::JobPolicy& policy, const Now& now, Events* events) {
  RF_ASSIGN_OR_RETURN(const JobState* job, FindJob(id));
  RF_RETURN_IF_ERROR(CheckPolicy(policy));
  if (IsTerminal(job->state)) return FailedPrecondition("job ", job->id, " has ended; its policy means nothing any more");
  if (job->created.policy().SerializeAsString() == policy.SerializeAsString()) return absl::OkStatus();
  RF_RETURN_IF_ERROR(read_only_);
  const std::string full_id = job->id;
  v1::Event event;
  *event.mutable_job_policy_changed()->mutable_policy() = policy;
  Emit(full_id, std::move(event), now, events);
  Advance(full_id, now, events);
  return absl::OkStatus();
}

Status Core::SetTenant(const v1::TenantPolicy& policy, const Now& now, Events* events) {
  RF_RETURN_IF_ERROR(CheckTenant(policy));
  RF_RETURN_IF_ERROR(read_only_);
  v1::Event event;
  *event.mutable_tenant_changed()->mutable_policy() = policy;
  Emit("", std::move(event), now, events);
  return absl::OkStatus();
}

}  // namespace refinery::jobs
