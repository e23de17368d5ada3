#include "server/api/upkeep.h"

#include <malloc.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <unordered_set>

#include "server/store/artifacts.h"
#include "server/store/event_log.h"
#include "server/store/snapshots.h"

namespace refinery::api {
namespace {

constexpr int kNice = 10;

}  // namespace

Upkeep::Upkeep() : thread_([this] { Run(); }) {}

Upkeep::~Upkeep() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

bool Upkeep::Start(std::function<void()> work) {
  {
    std::lock_guard lock(mutex_);
    if (work_ || stopping_) return false;
    work_ = std::move(work);
  }
  wake_.notify_all();
  return true;
}

void Upkeep::Run() {
  setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), kNice);
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    wake_.wait(lock, [this] { return stopping_ || work_; });
    if (!work_) continue;
    lock.unlock();
    work_();
    malloc_trim(0);  // a snapshot takes the memory of a whole state for a moment
    lock.lock();
    work_ = nullptr;
  }
}

Status MakeSnapshot(const std::filesystem::path& state, const std::string& code_version, uint64_t up_to) {
  jobs::State made;
  StatusOr<store::StoredSnapshot> stored = store::ReadNewestSnapshot(state, up_to);
  if (stored.ok()) {
    RF_ASSIGN_OR_RETURN(made, jobs::ReadSnapshot(stored->bytes, code_version));
    stored->bytes = {};
  } else if (!absl::IsNotFound(stored.status())) {
    return stored.status();
  }
  if (made.last_seq == up_to && stored.ok()) return absl::OkStatus();
  RF_RETURN_IF_ERROR(store::ReplayEventLog(state, made.last_seq, up_to, [&](const v1::Event& event) {
    return jobs::Apply(made, event, code_version);
  }));
  return store::WriteSnapshot(state, up_to, jobs::TakeSnapshot(made));
}

void AddReferences(const jobs::JobState& job, std::vector<std::string>* artifacts) {
  const auto add = [&](const std::string& digest) {
    if (!digest.empty()) artifacts->push_back(digest);
  };
  for (const auto& [role, digest] : job.created.files()) add(digest);
  for (const jobs::TaskState& task : job.tasks) {
    for (const v1::ArtifactRef& input : task.spec.inputs()) add(input.digest());
    add(task.output.digest());
    if (task.state != v1::Task::DONE && task.state != v1::Task::CACHED) add(task.checkpoint.digest());  // a retry goes on there
  }
  add(job.artifact.digest());
  add(job.best_artifact.digest());
  add(job.report.digest());
}

StatusOr<Collected> Collect(store::BlobStore& blobs, const std::vector<std::string>& artifacts, std::chrono::milliseconds now,
                            std::chrono::milliseconds grace) {
  Collected collected;
  std::unordered_set<std::string> live;
  for (const std::string& artifact : artifacts) {
    if (!live.insert(artifact).second) continue;
    StatusOr<std::vector<FileEntry>> files = store::FilesOf(blobs, artifact);
    if (absl::IsNotFound(files.status())) {
      collected.lost.push_back(artifact);
      continue;
    }
    // Without its manifest nobody knows which blobs are its: better to keep all.
    if (!files.ok()) return files.status();
    bool complete = true;
    for (FileEntry& file : *files) {
      complete = complete && blobs.Contains(file.digest);
      live.insert(std::move(file.digest));
    }
    if (!complete) collected.lost.push_back(artifact);
  }
  RF_ASSIGN_OR_RETURN(collected.swept, blobs.Sweep([&](const std::string& digest) { return live.contains(digest); }, now, grace));
  return collected;
}

}  // namespace refinery::api
