// The part of the core that carries out what people ask of a whole job or tenant.

#include <algorithm>

#include "server/jobs/core.h"
#include "server/jobs/policy.h"
#include "server/jobs/text.h"

namespace refinery::jobs {

Status Core::CancelJob(const std::string& id, const std::string& reason, const Now& now, Events* events) {
  RF_ASSIGN_OR_RETURN(const JobState* job, FindJob(id));
  if (IsTerminal(job->state) || job->state == v1::Job::CANCELLING) return absl::OkStatus();
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
  if (IsTerminal(job.state) || job.state == v1::Job::CANCELLING) {
    return FailedPrecondition("job ", job.id, " is ", v1::Job::State_Name(job.state), "; only a running job can be paused");
  }
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
  if (job.state != v1::Job::PAUSED) {
    return FailedPrecondition("job ", job.id, " is ", v1::Job::State_Name(job.state), "; only a paused job can be resumed",
                              job.state == v1::Job::FAILED || job.state == v1::Job::CANCELLED ? ", try to retry it" : "");
  }
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
  if (!IsTerminal(job->state)) return absl::OkStatus();
  if (job->state == v1::Job::SUCCEEDED) return FailedPrecondition("job ", job->id, " has succeeded; there is nothing to retry");
  if (job->study_finished && !job->best.contains("best")) {
    return FailedPrecondition("every trial of job ", job->id, " diverged, and would again; submit it with lower learning rates");
  }
  RF_RETURN_IF_ERROR(CheckJobQuota(state_, job->created.policy()));
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
  const std::string full_id = job->id;
  v1::Event event;
  *event.mutable_job_policy_changed()->mutable_policy() = policy;
  Emit(full_id, std::move(event), now, events);
  Advance(full_id, now, events);
  return absl::OkStatus();
}

Status Core::SetTenant(const v1::TenantPolicy& policy, const Now& now, Events* events) {
  RF_RETURN_IF_ERROR(CheckTenant(policy));
  v1::Event event;
  *event.mutable_tenant_changed()->mutable_policy() = policy;
  Emit("", std::move(event), now, events);
  return absl::OkStatus();
}

}  // namespace refinery::jobs
