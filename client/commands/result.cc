#include "client/commands/result.h"

#include "client/render/job_text.h"
#include "client/render/terminal.h"
#include "common/artifact_client.h"
#include "common/files.h"

namespace refinery::client {
namespace {
constexpr uint64_t kMaxTableBytes = 1 << 20;
}  // namespace

Status FetchResult(Connection& connection, const v1::Job& job, const std::filesystem::path& folder) {
  if (!job.has_artifact() && !job.has_best() && !job.has_report()) {
    return FailedPrecondition("job ", job.id(), " is ", StateName(job.state()),
                              " and has left neither artifact nor report; see `refinery describe ", job.id(), "`");
  }
  if (Status status = CreateFolders(folder); !status.ok()) return FailedPrecondition(Message(status));
  ArtifactClient client(connection.channel);
  if (job.has_artifact()) RF_RETURN_IF_ERROR(client.DownloadFolder(job.artifact().digest(), folder / "artifact"));
  if (job.has_best()) RF_RETURN_IF_ERROR(client.DownloadFolder(job.best().digest(), folder / "best"));
  if (job.has_report()) RF_RETURN_IF_ERROR(client.DownloadFolder(job.report().digest(), folder / "report"));
  return absl::OkStatus();
}

StatusOr<std::string> ReportTable(Connection& connection, const v1::Job& job) {
  const bool ended = job.state() >= v1::Job::SUCCEEDED;
  if (!job.has_report() && ended) {
    return FailedPrecondition("job ", job.id(), " is ", StateName(job.state()), " and has no report", BestText(job), "; see `refinery describe ",
                              job.id(), "`");
  }
  if (!job.has_report()) {
    return FailedPrecondition("job ", job.id(), " is ", StateName(job.state()), " and has no report yet; see `refinery watch ",
                              job.id(), "`");
  }
  return ArtifactClient(connection.channel).ReadArtifactFile(job.report().digest(), "table.txt", kMaxTableBytes);
}

std::string BestText(const v1::Job& job) {
  return job.has_best() ? Join("; `refinery fetch ", job.id(), "` brings the best adapter it came to") : "";
}

std::string FailureText(const v1::Job& job) {
  std::string reason = Printable(job.reason());
  if (job.state() == v1::Job::CANCELLED) return Join("job ", job.id(), " was cancelled", reason.empty() ? "" : ": ", reason, BestText(job));
  for (const v1::Task& task : job.tasks()) {
    if (task.state() != v1::Task::DEAD || !task.has_error()) continue;
    return Join("job ", job.id(), " failed in ", task.path(), ": ", Printable(task.error().message()), "\nSee `refinery logs ",
                job.id(), " --task ", task.path(), "`");
  }
  return Join("job ", job.id(), " failed: ", reason, "\nSee `refinery describe ", job.id(), "`");
}

}  // namespace refinery::client
