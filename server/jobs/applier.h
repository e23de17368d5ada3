// server/jobs/applier.h
//
// One event being taken into the state, or a whole job out of a snapshot. Used by Apply and ReadSnapshot only.
//
// Errors: DATA_LOSS for an event that does not fit.  Threads: none of its own.

#pragma once

#include <string>
#include <string_view>

#include "server/jobs/state.h"

namespace refinery::jobs {

inline constexpr size_t kMaxNotesPerJob = 2000;
inline constexpr uint32_t kEventVersion = 1;  // the newest meaning of an event that this program knows

class Applier {
 public:
  Applier(State& state, const v1::Event& event, const std::string& code_version)
      : state_(state), event_(event), code_version_(code_version) {}

  Status Run();

  // For a snapshot: the job gets its plan and its tasks, all of them BLOCKED; `job` stays in the caller's hands.
  static Status Plan(JobState& job, const std::string& code_version);
  // Fills in what the plan left open: the digests of the inputs and the settings of the trial; not the task's identity.
  static void Resolve(JobState& job, size_t i);
  // Puts a job into the indexes that its state asks for, or takes it out.
  static void Index(State& state, const JobState& job);
  static void Unqueue(State& state, const JobState& job);
  static void IndexLease(State& state, const JobState& job, size_t i, bool leased);

 private:
  Status Misfit(std::string_view why) const {
    return DataLoss("event ", event_.seq(), " of the log does not fit: ", why);
  }

  // apply.cc: jobs and studies.
  Status ChangeJob();
  Status CreateJob();
  Status SuggestTrial();
  Status FinishTrial();
  Status FinishStudy();
  Status RequestCancel();
  Status Pause();
  Status Resume();
  Status Retry();
  Status FinishJob();
  Status ChangeTenant();
  void TakeMark();

  // apply_task.cc: tasks.
  Status ChangeTask();
  // Finds the task that `item` names and calls `handler` with it.
  template <typename Item>
  Status OnTask(const Item& item, void (Applier::*handler)(size_t, TaskState&, const Item&)) {
    const auto found = job_->index.find(item.path());
    if (found == job_->index.end()) return Misfit(Join("job ", job_->id, " has no task ", item.path()));
    const plan::PlannedTask& planned = job_->plan.tasks[found->second];
    if (planned.kind == v1::TRAIN && static_cast<size_t>(planned.trial) >= job_->trials.size()) {
      return Misfit(Join("the trial of ", item.path(), " was not suggested"));
    }
    (this->*handler)(found->second, job_->tasks[found->second], item);
    return absl::OkStatus();
  }
  // BLOCKED -> READY once everything the task waits for is there.
  void MakeReadyIfPossible(size_t i);
  // Keeps the spec of a task what its inputs are now, as a snapshot's reader would fill it in.
  void ResolveAgain(size_t i);
  // Moves the task to another state, keeping the sets and counts.
  void Move(size_t i, v1::Task::State to);
  void SetState(size_t i, v1::Task::State to);
  // The task may run again, unless the job is being cancelled; now, or when what was lost of its inputs is there again. (Those may
  // have changed: they are looked up anew.)
  void Release(size_t i) {
    Move(i, job_->state == v1::Job::CANCELLING ? v1::Task::CANCELLED : v1::Task::BLOCKED);
    MakeReadyIfPossible(i);
  }
  void Leased(size_t i, TaskState& task, const v1::TaskLeased& leased);
  void Finished(size_t i, TaskState& task, const v1::TaskFinished& finished);
  void Failed(size_t i, TaskState& task, const v1::TaskFailed& failed);
  void Expired(size_t i, TaskState& task, const v1::LeaseExpired& expired);
  void Released(size_t i, TaskState& task, const v1::LeaseReleased& released);
  void Checkpoint(size_t i, TaskState& task, const v1::CheckpointCommitted& committed);
  void Lost(size_t i, TaskState& task, const v1::ArtifactLost& lost);
  v1::Replicate* ReplicateOf(size_t i);

  State& state_;
  const v1::Event& event_;
  const std::string& code_version_;
  JobState* job_ = nullptr;
};

}  // namespace refinery::jobs
