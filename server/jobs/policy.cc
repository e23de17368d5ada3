#include "server/jobs/policy.h"

#include <algorithm>
#include <cmath>

namespace refinery::jobs {
namespace {

constexpr uint32_t kMaxGang = 4096;
constexpr size_t kMaxNameBytes = 200;

Status CheckRequirements(const v1::Requirements& requirements, std::string_view field) {
  if (requirements.gang() > kMaxGang) return InvalidArgument(field, ".gang is ", requirements.gang(), "; at most ", kMaxGang);
  return absl::OkStatus();
}

bool IsKind(const std::string& name) {
  for (int kind = v1::TaskKind_MIN; kind <= v1::TaskKind_MAX; ++kind) {
    if (v1::TaskKind_IsValid(kind) && kind != 0 && KindName(static_cast<v1::TaskKind>(kind)) == name) return true;
  }
  return false;
}

}  // namespace

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
