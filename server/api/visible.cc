#include "server/api/visible.h"

#include <algorithm>
#include <string_view>
#include <vector>

#include "common/error_details.h"

namespace refinery::api {
namespace {

constexpr std::string_view kTenants = "tenants/";
constexpr std::string_view kJobs = "/jobs/";
constexpr size_t kMaxNameBytes = 200;
constexpr size_t kMaxCandidates = 5;

struct ParsedName {
  std::string tenant;  // empty: not said
  std::string id;
};

ParsedName Parse(const std::string& name) {
  if (!name.starts_with(kTenants)) return {.id = name};
  const size_t jobs = name.find(kJobs, kTenants.size());
  if (jobs == std::string::npos) return {.id = name};
  return {.tenant = name.substr(kTenants.size(), jobs - kTenants.size()), .id = name.substr(jobs + kJobs.size())};
}

Status NoSuchJob(const std::string& name) {
  return WithResource(WithReason(NotFound("there is no job ", name, "; `refinery list` shows the jobs"), "JOB_NOT_FOUND"), "job",
                      name);
}

}  // namespace

std::string TenantOf(const jobs::JobState& job) {
  const std::string& tenant = job.created.policy().tenant();
  return tenant.empty() ? kDefaultTenant : tenant;
}

std::string NameOf(const jobs::JobState& job) { return Join(kTenants, TenantOf(job), kJobs, job.id); }

std::string EtagOf(const jobs::JobState& job) { return Join("e", job.last_seq); }

StatusOr<const jobs::JobState*> FindJob(const jobs::State& state, const security::Principal& principal, const std::string& name) {
  if (name.size() > kMaxNameBytes) return WithField(InvalidArgument("id has ", name.size(), " bytes; no job is called so"), "id");
  const ParsedName parsed = Parse(name);
  if (parsed.id.empty()) return WithField(InvalidArgument("id is missing; name a job"), "id");
  const auto visible = [&](const jobs::JobState& job) {
    const std::string tenant = TenantOf(job);
    return principal.MaySee(tenant) && (parsed.tenant.empty() || parsed.tenant == tenant);
  };
  const auto exact = state.jobs.find(parsed.id);
  if (exact != state.jobs.end() && visible(exact->second)) return &exact->second;
  std::vector<const jobs::JobState*> matches;
  for (auto it = state.jobs.lower_bound(parsed.id); it != state.jobs.end() && it->first.starts_with(parsed.id); ++it) {
    if (visible(it->second)) matches.push_back(&it->second);
  }
  if (matches.size() == 1) return matches.front();
  if (matches.empty()) return NoSuchJob(name);
  std::string names;
  for (size_t i = 0; i < std::min(matches.size(), kMaxCandidates); ++i) names += Join(i ? ", " : "", matches[i]->id);
  return WithField(InvalidArgument("'", name, "' begins the names of ", matches.size(), " jobs (", names, "); write more of it"),
                   "id");
}

v1::Job ShowJob(const jobs::JobState& job, bool with_tasks, const jobs::Now& now) {
  v1::Job proto = jobs::ToProto(job, with_tasks, now);
  proto.set_name(NameOf(job));
  proto.set_tenant(TenantOf(job));
  proto.set_owner(job.created.owner());
  proto.set_priority(job.created.policy().priority());
  proto.set_etag(EtagOf(job));
  *proto.mutable_policy() = job.created.policy();
  return proto;
}

}  // namespace refinery::api
