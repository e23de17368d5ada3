#include "tests/simulation/auditor.h"

#include <utility>

namespace refinery::simulation {

std::string TaskName(const v1::LeaseToken& token) { return Join(token.job(), "/", token.path()); }

std::string Auditor::Key(const v1::LeaseToken& token) { return Join(token.job(), "/", token.path(), "#", token.epoch()); }

void Auditor::Fail(std::string what) {
  if (!result_->ok) return;
  result_->ok = false;
  result_->failure = std::move(what);
}

void Auditor::OnEvents(const jobs::Events& events) {
  for (const v1::Event& event : events) OnEvent(event, true);
  again_.clear();
}

void Auditor::OnRecovered(const jobs::Events& log_tail, uint64_t base_seq, uint64_t seq) {
  if (seq < acknowledged_) {
    Fail(Join("an acknowledged change was lost: the log ends at ", seq, " after the restart, ", acknowledged_, " was acknowledged"));
  }
  if (base_seq != base_.seq) Fail(Join("the snapshot stands for ", base_seq, " events, not ", base_.seq));
  Model model = base_;
  jobs_ = std::move(model.jobs);
  tenants_ = std::move(model.tenants);
  leases_ = std::move(model.leases);
  requests_ = std::move(model.requests);
  seq_ = model.seq;
  for (const v1::Event& event : log_tail) OnEvent(event, false);
}

void Auditor::OnCompacted(uint64_t seq) {
  if (seq != seq_) Fail(Join("a snapshot of ", seq, " events was taken at ", seq_));
  base_ = {jobs_, tenants_, leases_, requests_, seq_};
}

void Auditor::LoseBlob(size_t which) {
  constexpr int kMostLosses = 2;
  if (committed_.empty()) return;
  const std::string& digest = committed_[which % committed_.size()];
  if (lost_[digest] < kMostLosses && blobs_.erase(digest) > 0) ++lost_[digest];
}

std::vector<std::string> Auditor::LostBlobs() const {
  std::vector<std::string> digests;
  for (const auto& [digest, count] : lost_) {
    if (count > 0 && !blobs_.contains(digest)) digests.push_back(digest);
  }
  return digests;
}

void Auditor::Unlease(Job& job, Task& task) {
  if (task.leased) --leases_[job.tenant];
  task.leased = false;
}

void Auditor::TakeBack(const std::string& job_id, Job& job, const std::string& path, Task& task) {
  if (task.leased) taken_back_.insert(Join(job_id, "/", path, "#", task.epoch));
  Unlease(job, task);
}

void Auditor::CheckCurrent(const v1::Event& event, const Task& task, uint64_t epoch) {
  if (task.leased && task.epoch == epoch) return;
  Fail(Join("event ", event.seq(), " takes epoch ", epoch, " of a task that is at ", task.epoch, task.leased ? " and leased" : ""));
}

void Auditor::OnEvent(const v1::Event& event, bool live) {
  if (event.seq() != seq_ + 1) return Fail(Join("event ", event.seq(), " follows event ", seq_));
  seq_ = event.seq();
  if (event.has_request() && !requests_.insert(event.request().key()).second) {
    return Fail(Join("the call ", event.request().key(), " was carried out twice"));
  }
  if (event.has_request_answered()) return;
  if (event.has_tenant_changed()) {
    tenants_[event.tenant_changed().policy().tenant()] = event.tenant_changed().policy();
    return;
  }
  const bool known = jobs_.contains(event.job());
  if (event.has_job_created() == known) return Fail(Join("event ", seq_, " is about ", known ? "a known" : "an unknown", " job"));
  Job& job = jobs_[event.job()];
  if (jobs::IsTerminal(job.state) && !event.has_job_retried()) {
    return Fail(Join("event ", seq_, " happens to job ", event.job(), " after its end"));
  }
  switch (event.kind_case()) {
    case v1::Event::kJobCreated:
      if (!event.job_created().policy().tenant().empty()) job.tenant = event.job_created().policy().tenant();
      break;
    case v1::Event::kJobCancelRequested: job.state = v1::Job::CANCELLING; break;
    case v1::Event::kJobPaused: job.state = v1::Job::PAUSED; break;
    case v1::Event::kJobResumed:
    case v1::Event::kJobRetried: job.state = v1::Job::RUNNING; break;
    case v1::Event::kJobFinished:
      job.state = event.job_finished().outcome() == v1::JobFinished::SUCCEEDED ? v1::Job::SUCCEEDED : v1::Job::FAILED;
      for (auto& [path, task] : job.tasks) TakeBack(event.job(), job, path, task);
      break;
    case v1::Event::kStudyFinished:  // trials that are given up lose their leases
      if (!event.study_finished().early()) break;
      for (auto& [path, task] : job.tasks) {
        if (path.starts_with("trial/") && !task.done) TakeBack(event.job(), job, path, task);
      }
      break;
    case v1::Event::kTaskLeased: return OnLeased(event, job, TaskOf(event, event.task_leased().path()), live);
    case v1::Event::kTaskFinished: return OnFinished(event, job, TaskOf(event, event.task_finished().path()), live);
    case v1::Event::kTaskFailed: {
      Task& task = TaskOf(event, event.task_failed().path());
      task.reported_epoch = event.task_failed().epoch();
      Unlease(job, task);
      break;
    }
    case v1::Event::kLeaseExpired: {
      Task& task = TaskOf(event, event.lease_expired().path());
      CheckCurrent(event, task, event.lease_expired().epoch());
      if (event.lease_expired().cause() == v1::LeaseExpired::STALLED) {
        TakeBack(event.job(), job, event.lease_expired().path(), task);
      }
      Unlease(job, task);
      break;
    }
    case v1::Event::kLeaseReleased: {
      Task& task = TaskOf(event, event.lease_released().path());
      CheckCurrent(event, task, event.lease_released().epoch());
      TakeBack(event.job(), job, event.lease_released().path(), task);
      break;
    }
    case v1::Event::kCheckpointCommitted: {
      const v1::CheckpointCommitted& committed = event.checkpoint_committed();
      Task& task = TaskOf(event, committed.path());
      CheckCurrent(event, task, committed.epoch());
      if (committed.step() <= task.checkpoint_step) Fail(Join("event ", seq_, " takes a checkpoint back to step ", committed.step()));
      task.checkpoint_step = committed.step();
      committed_.push_back(committed.checkpoint().digest());
      if (live && !blobs_.contains(committed.checkpoint().digest())) Fail(Join("event ", seq_, " names a checkpoint that is not stored"));
      break;
    }
    case v1::Event::kArtifactLost: return OnLost(event, TaskOf(event, event.artifact_lost().path()), live);
    default: break;
  }
}

void Auditor::OnLost(const v1::Event& event, Task& task, bool live) {
  const v1::ArtifactLost& lost = event.artifact_lost();
  if (live && blobs_.contains(lost.digest()) && !again_.contains(lost.digest())) Fail(Join("event ", seq_, " says that ", lost.digest(), " is lost; it is stored"));
  task.checkpoint_step = 0;
  if (lost.checkpoint()) return;
  if (!task.done) Fail(Join("event ", seq_, " says that the output of ", lost.path(), " is lost; it has none"));
  task.done = false;
}

void Auditor::OnLeased(const v1::Event& event, Job& job, Task& task, bool live) {
  const v1::TaskLeased& leased = event.task_leased();
  const std::string name = Join(event.job(), "/", leased.path());
  if (task.leased) Fail(Join(name, " was leased twice at a time"));
  if (task.done) Fail(Join(name, " was leased after it was done"));
  if (leased.epoch() <= task.epoch) Fail(Join("the epoch of ", name, " fell from ", task.epoch, " to ", leased.epoch()));
  if (job.state == v1::Job::PAUSED || job.state == v1::Job::CANCELLING) Fail(Join(name, " was leased while its job may start nothing"));
  task.epoch = leased.epoch();
  task.leased = true;
  const uint32_t leases = ++leases_[job.tenant];
  const auto tenant = tenants_.find(job.tenant);
  if (live && tenant != tenants_.end() && tenant->second.max_leases() > 0 && leases > tenant->second.max_leases()) {
    Fail(Join("tenant ", job.tenant, " has ", leases, " leases; its quota is ", tenant->second.max_leases()));
  }
}

void Auditor::OnFinished(const v1::Event& event, Job& job, Task& task, bool live) {
  const v1::TaskFinished& finished = event.task_finished();
  const std::string name = Join(event.job(), "/", finished.path());
  if (task.done) Fail(Join("the result of ", name, " was applied twice"));
  task.done = true;
  if (!finished.output().digest().empty()) committed_.push_back(finished.output().digest());
  if (finished.cached()) {
    if (live && !blobs_.contains(finished.output().digest())) Fail(Join("the cached output of ", name, " is not stored"));
    if (task.leased) Fail(Join(name, " was taken from the cache while it was leased"));
    return;
  }
  CheckCurrent(event, task, finished.epoch());
  task.reported_epoch = finished.epoch();
  Unlease(job, task);
  if (!live) return;
  if (!blobs_.contains(finished.output().digest())) Fail(Join("the output of ", name, " was committed before its bytes were stored"));
  const auto made = made_.find(Join(name, "#", finished.epoch()));
  if (made == made_.end() || made->second != finished.output().digest()) {
    Fail(Join("the result of ", name, " is not what its attempt ", finished.epoch(), " made"));
  }
}

void Auditor::OnRunning(const v1::LeaseToken& token, const std::string& worker) {
  auto& runners = running_[TaskName(token)];
  for (const auto& [other, epoch] : runners) {
    v1::LeaseToken held = token;
    held.set_epoch(epoch);
    if (other == worker || suspended_.contains(other) || taken_back_.contains(Key(held))) continue;
    Fail(Join(TaskName(token), " runs on ", worker, " (epoch ", token.epoch(), ") and on ", other, " (epoch ", epoch, ") at a time"));
  }
  runners[worker] = token.epoch();
}

void Auditor::OnStopped(const v1::LeaseToken& token, const std::string& worker) {
  const auto runners = running_.find(TaskName(token));
  if (runners == running_.end()) return;
  const auto mine = runners->second.find(worker);
  if (mine != runners->second.end() && mine->second == token.epoch()) runners->second.erase(mine);
  if (runners->second.empty()) running_.erase(runners);
}

void Auditor::OnSuspended(const std::string& worker, bool suspended) {
  if (suspended) {
    suspended_.insert(worker);
  } else {
    suspended_.erase(worker);
  }
}

bool Auditor::IsStale(const v1::LeaseToken& token, bool is_end) const {
  const auto job = jobs_.find(token.job());
  if (job == jobs_.end()) return true;
  const auto task = job->second.tasks.find(token.path());
  if (task == job->second.tasks.end()) return true;
  if (is_end && task->second.reported_epoch == token.epoch()) return false;
  return task->second.epoch != token.epoch() || !task->second.leased;
}

void Auditor::OnCommitAnswered(const v1::LeaseToken& token, bool stale, bool accepted) {
  if (!stale) return;
  ++result_->late_commits;
  if (!accepted) {
    ++result_->late_commits_refused;
    return;
  }
  Fail(Join("a commit for epoch ", token.epoch(), " of ", TaskName(token), " was accepted although its lease is over"));
}

}  // namespace refinery::simulation
