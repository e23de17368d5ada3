// tests/simulation/auditor.h
//
// Watches a run from outside with a model of its own, far simpler than the core: what the log says, what was acknowledged, what
// the workers really did. The first contradiction ends the run.
//
//   - events have no gap; nothing happens to a job that has ended, unless it is retried; PAUSED and CANCELLING jobs start nothing
//   - a user's call is carried out once, however often it is repeated
//   - a task has at most one lease; its epoch only rises; only the current epoch finishes, fails or commits a checkpoint
//   - a task's result is applied once, it is what that attempt really made, and its bytes are in the store
//   - a done task runs again only when its output was lost, and no job fails for a loss
//   - what was acknowledged is in the log after every restart
//   - a tenant never has more leases than its quota
//   - no two workers run one task at a time, and none runs what its lease no longer covers

#pragma once

#include <map>
#include <set>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "server/jobs/core.h"
#include "tests/simulation/options.h"

namespace refinery::simulation {

// "job/path".
std::string TaskName(const v1::LeaseToken& token);

class Auditor {
 public:
  explicit Auditor(Result* result) : result_(result) {}

  bool failed() const { return !result_->ok; }
  void Fail(std::string what);

  // New events, when the coordinator has decided on them; `full` = they are about to be written.
  void OnEvents(const jobs::Events& events);
  // The coordinator lost its memory and came back with the log up to `seq`: the model goes back with it.
  void OnRecovered(const jobs::Events& log_tail, uint64_t base_seq, uint64_t seq);
  // A reply that depends on everything up to `seq` is on its way to somebody.
  void OnAcknowledged(uint64_t seq) { acknowledged_ = std::max(acknowledged_, seq); }
  // A snapshot was taken of everything up to now, and older events are gone.
  void OnCompacted(uint64_t seq);

  // What workers do.
  void OnUploaded(const std::string& digest) { blobs_.insert(digest); }
  // The same by a message of this turn, whose earlier ones may have found it missing.
  void OnUploadedAgain(const std::string& digest) {
    blobs_.insert(digest);
    again_.insert(digest);
  }
  // Removes one of the results and checkpoints that were committed so far; none more than twice.
  void LoseBlob(size_t which);
  std::vector<std::string> LostBlobs() const;
  bool HasBlob(const std::string& digest) const { return blobs_.contains(digest); }
  void OnMade(const v1::LeaseToken& token, const std::string& digest) { made_[Key(token)] = digest; }
  void OnRunning(const v1::LeaseToken& token, const std::string& worker);
  void OnStopped(const v1::LeaseToken& token, const std::string& worker);
  // The worker does not run anything for now, though it holds it (SIGSTOP).
  void OnSuspended(const std::string& worker, bool suspended);

  // Whether a commit with this token must be refused: its lease is over. (The end of an attempt may be reported again.)
  bool IsStale(const v1::LeaseToken& token, bool is_end) const;
  void OnCommitAnswered(const v1::LeaseToken& token, bool stale, bool accepted);

 private:
  struct Task {
    uint64_t epoch = 0;
    bool leased = false;
    bool done = false;
    uint64_t checkpoint_step = 0;
    uint64_t reported_epoch = 0;
  };
  struct Job {
    v1::Job::State state = v1::Job::PENDING;
    std::string tenant = "default";
    std::unordered_map<std::string, Task> tasks;
  };
  static std::string Key(const v1::LeaseToken& token);
  void OnEvent(const v1::Event& event, bool live);
  void OnLeased(const v1::Event& event, Job& job, Task& task, bool live);
  void OnFinished(const v1::Event& event, Job& job, Task& task, bool live);
  void OnLost(const v1::Event& event, Task& task, bool live);
  Task& TaskOf(const v1::Event& event, const std::string& path) { return jobs_[event.job()].tasks[path]; }
  void Unlease(Job& job, Task& task);
  // The lease ends although its worker may still run the attempt for a moment.
  void TakeBack(const std::string& job_id, Job& job, const std::string& path, Task& task);
  void CheckCurrent(const v1::Event& event, const Task& task, uint64_t epoch);

  struct Model {
    std::unordered_map<std::string, Job> jobs;
    std::map<std::string, v1::TenantPolicy> tenants;
    std::map<std::string, uint32_t> leases;  // by tenant
    std::set<std::string> requests;          // keys of calls that were carried out
    uint64_t seq = 0;
  };

  Result* const result_;
  std::unordered_map<std::string, Job> jobs_;
  std::map<std::string, v1::TenantPolicy> tenants_;
  std::map<std::string, uint32_t> leases_;
  std::set<std::string> requests_;
  uint64_t seq_ = 0;
  Model base_;  // at the last compaction
  uint64_t acknowledged_ = 0;
  std::unordered_set<std::string> blobs_;
  std::vector<std::string> committed_;                                // results and checkpoints, oldest first
  std::map<std::string, int> lost_;                                   // how often
  std::set<std::string> again_;                                       // uploaded by messages of this turn
  std::unordered_map<std::string, std::string> made_;                 // attempt -> digest of its output
  std::unordered_map<std::string, std::map<std::string, uint64_t>> running_;  // task -> worker -> epoch
  std::set<std::string> suspended_;
  std::unordered_set<std::string> taken_back_;                        // attempts that were released or found stalled
};

}  // namespace refinery::simulation
