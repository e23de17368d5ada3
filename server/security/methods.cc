#include "server/security/methods.h"

#include <algorithm>

#include "common/principals.h"

namespace refinery::security {
namespace {

constexpr int kAdmin = static_cast<int>(Role::kAdmin);
constexpr int kWorker = static_cast<int>(Role::kWorker);
constexpr int kSubmitters = kAdmin | static_cast<int>(Role::kSubmitter);
constexpr int kViewers = kSubmitters | static_cast<int>(Role::kViewer);
constexpr bool kAudited = true;

}  // namespace

const std::vector<Method>& Methods() {
  static const std::vector<Method> methods = {
      {"/refinery.v1.JobService/CreateJob", kSubmitters, kAudited},
      {"/refinery.v1.JobService/GetJob", kViewers},
      {"/refinery.v1.JobService/ListJobs", kViewers},
      {"/refinery.v1.JobService/CancelJob", kSubmitters, kAudited},
      {"/refinery.v1.JobService/KillJob", kSubmitters, kAudited},
      {"/refinery.v1.JobService/PauseJob", kSubmitters, kAudited},
      {"/refinery.v1.JobService/ResumeJob", kSubmitters, kAudited},
      {"/refinery.v1.JobService/RetryJob", kSubmitters, kAudited},
      {"/refinery.v1.JobService/UpdateJob", kSubmitters, kAudited},
      {"/refinery.v1.JobService/DiffJobs", kViewers},
      {"/refinery.v1.JobService/PlanJob", kViewers},
      {"/refinery.v1.JobService/WatchJob", kViewers},
      {"/refinery.v1.JobService/TailLogs", kViewers},
      {"/refinery.v1.JobService/ListWorkers", kViewers},
      {"/refinery.v1.JobService/GetVersion", kViewers | kWorker},
      {"/refinery.v1.ArtifactService/FindMissingBlobs", kViewers | kWorker},
      {"/refinery.v1.ArtifactService/QueryWriteStatus", kSubmitters | kWorker},
      {"/refinery.v1.ArtifactService/WriteBlob", kSubmitters | kWorker},
      {"/refinery.v1.ArtifactService/ReadBlob", kViewers | kWorker},
      // A worker's calls are in the event log, which says more; a thousand workers would drown the audit log.
      {"/refinery.v1.WorkerService/Synchronize", kAdmin | kWorker},
      {"/refinery.v1.WorkerService/CompleteTask", kAdmin | kWorker},
      {"/refinery.v1.WorkerService/CommitCheckpoint", kAdmin | kWorker},
      {"/refinery.v1.AdminService/GetCoordinator", kViewers},
      {"/refinery.v1.AdminService/DrainCoordinator", kAdmin, kAudited},
      {"/refinery.v1.AdminService/DrainWorker", kAdmin, kAudited},
      {"/refinery.v1.AdminService/ListTenants", kAdmin},
      {"/refinery.v1.AdminService/SetTenant", kAdmin, kAudited},
      {"/refinery.v1.AdminService/Backup", kAdmin, kAudited},
  };
  return methods;
}

const Method* FindMethod(std::string_view name) {
  const auto found = std::ranges::find(Methods(), name, &Method::name);
  return found == Methods().end() ? nullptr : &*found;
}

}  // namespace refinery::security
