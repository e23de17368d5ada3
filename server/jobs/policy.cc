#include "server/jobs/policy.h"

#include <algorithm>
#include <cmath>
#include <tuple>

namespace refinery::jobs {
namespace {

constexpr uint32_t kMaxGang = 4096;
constexpr uint32_t kMaxDevices = 4096;
constexpr uint64_t kMaxBytes = uint64_t{1} << 50;
constexpr size_t kMaxNameBytes = 200;

Status CheckRequirements(const v1::Requirements& requirements, std::string_view field) {
  const std::tuple<const char*, uint64_t, uint64_t> bounds[] = {
      {"gang", requirements.gang(), kMaxGang},
      {"devices", requirements.devices(), kMaxDevices},
      {"device_memory_bytes", requirements.device_memory_bytes(), kMaxBytes},
      {"memory_bytes", requirements.memory_bytes(), kMaxBytes},
      {"disk_bytes", requirements.disk_bytes(), kMaxBytes},
  };
  for (const auto& [name, value, most] : bounds) {
    if (value > most) return InvalidArgument(field, ".", name, " is ", value, "; at most ", most);
  }
  return absl::OkStatus();
}

bool IsKind(const std::string& name) {
  for (int kind = v1::TaskKind_MIN; kind <= v1::TaskKind_MAX; ++kind) {
    if (v1::TaskKind_IsValid(kind) && kind != 0 && KindName(static_cast<v1::TaskKind>(kind)) == name) return true;
  }
  return false;
}

// "job x failed", "job x is paused"
std::string Stands(const JobState& job) {
  switch (job.state) {
    case v1::Job::PAUSED: return Join("job ", job.id, " is paused");
    case v1::Job::CANCELLING: return Join("job ", job.id, " is being cancelled");
    case v1::Job::SUCCEEDED: return Join("job ", job.id, " has succeeded");
    case v1::Job::FAILED: return Join("job ", job.id, " has failed");
    case v1::Job::CANCELLED: return Join("job ", job.id, " was cancelled");
    default: return Join("job ", job.id, " is running");
  }
}

Status NotNow(const JobState& job, std::string_view sentence) { return FailedPrecondition(Stands(job), "; ", sentence); }

// Of a job that is not active: how it could be.
Status NotActive(const JobState& job, std::string_view verb) {
  if (job.state == v1::Job::CANCELLING) return NotNow(job, Join("wait until it has ended, then `refinery retry ", job.id, "` opens it again"));
  if (job.state == v1::Job::SUCCEEDED) return NotNow(job, Join("there is nothing left to ", verb));
  return NotNow(job, Join("there is nothing to ", verb, "; `refinery retry ", job.id, "` opens it again"));
}

}  // namespace

Status CheckPause(const JobState& job) {
  return IsTerminal(job.state) || job.state == v1::Job::CANCELLING ? NotActive(job, "pause") : absl::OkStatus();
}

Status CheckResume(const JobState& job) {
  return IsTerminal(job.state) || job.state == v1::Job::CANCELLING ? NotActive(job, "resume") : absl::OkStatus();
}

Status CheckRetry(const JobState& job) {
  if (job.state == v1::Job::CANCELLING) return NotNow(job, "wait until it has ended, then retry it");
  if (job.state == v1::Job::PAUSED) return NotNow(job, Join("`refinery resume ", job.id, "` lets it go on"));
  if (job.state == v1::Job::SUCCEEDED) return NotNow(job, "there is nothing to retry");
  if (IsTerminal(job.state) && job.study_finished && !job.best.contains("best")) {
    return FailedPrecondition("every trial of job ", job.id, " diverged, and would again; submit it with lower learning rates");
  }
  return absl::OkStatus();
}

Status CheckPolicy(const v1::JobPolicy& policy) {
  if (std::abs(policy.priority()) > kMaxPriority) {
    return InvalidArgument("policy.priority is ", policy.priority(), "; it goes from -", kMaxPriority, " to ", kMaxPriority);
  }
  if (policy.tenant().size() > kMaxNameBytes) return InvalidArgument("policy.tenant is longer than ", kMaxNameBytes, " bytes");
  RF_RETURN_IF_ERROR(CheckRequirements(policy.requirements(), "policy.requirements"));
  for (const auto& [kind, requirements] : policy.by_kind()) {
    if (!IsKind(kind)) return InvalidArgument("policy.by_kind names '", kind, "', which is no kind of task; try \"train\"");
    RF_RETURN_IF_ERROR(CheckRequirements(requirements, Join("policy.by_kind.", kind)));
  }
  const double seconds = policy.budget().device_seconds();
  if (!std::isfinite(seconds) || seconds < 0) return InvalidArgument("policy.budget.device_seconds must be 0 or more");
  return absl::OkStatus();
}

Status CheckTenant(const v1::TenantPolicy& policy) {
  if (policy.tenant().empty() || policy.tenant().size() > kMaxNameBytes) {
    return InvalidArgument("tenant must have 1 to ", kMaxNameBytes, " bytes");
  }
  if (!std::isfinite(policy.weight()) || policy.weight() < 0 || policy.weight() > kMaxWeight) {
    return InvalidArgument("the weight of tenant ", policy.tenant(), " must lie between 0 and ", kMaxWeight);
  }
  return absl::OkStatus();
}

Status CheckJobQuota(const State& state, const v1::JobPolicy& policy) {
  const std::string& tenant = policy.tenant().empty() ? "default" : policy.tenant();
  const auto found = state.tenants.find(tenant);
  if (found == state.tenants.end() || found->second.max_jobs() == 0) return absl::OkStatus();
  const auto count = std::count_if(state.active.begin(), state.active.end(),
                                   [&](const JobKey& key) { return state.jobs.at(key.second).tenant() == tenant; });
  if (count < found->second.max_jobs()) return absl::OkStatus();
  return ResourceExhausted("tenant ", tenant, " has ", count, " jobs that have not ended; it may have ",
                           found->second.max_jobs(), ": wait for one to end or cancel one");
}

}  // namespace refinery::jobs
