// worker/agent/attempt.h
//
// The whole life of one attempt on its own thread: fetch the inputs, run refinery-task, upload and commit its checkpoints,
// upload the outputs, report the end until the coordinator has taken it or refused it as stale. A coordinator that is away, full
// or busy is waited for: what the attempt has done is kept until it is taken, or the lease is over, or the worker stops.
//
// Threads: every public function may be called from any.

#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <filesystem>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include <grpcpp/channel.h>

#include "common/artifact_client.h"
#include "refinery/v1/worker_service.grpc.pb.h"
#include "worker/agent/artifact_cache.h"
#include "worker/agent/checkpoint_uploader.h"
#include "worker/agent/log_buffer.h"
#include "worker/agent/metrics.h"
#include "worker/agent/port_reserve.h"
#include "worker/agent/task_process.h"

namespace refinery::agent {

// What the attempts of one worker share; outlives them.
struct AttemptContext {
  std::shared_ptr<grpc::Channel> channel;
  ArtifactCache* artifacts = nullptr;
  PortReserve* ports = nullptr;
  WorkerMetrics* metrics = nullptr;
  std::filesystem::path cache;              // --cache of refinery-task
  std::filesystem::path work;               // each attempt has a folder below
  std::filesystem::path task_program;
  uint32_t threads = 1;                     // for a task that names none
  std::chrono::milliseconds stop_grace{5'000};   // between SIGTERM and SIGKILL
  ArtifactClient::Options transfers;        // their tries and waits; the rest is the attempt's
  std::function<void()> on_finished;        // called once, from the attempt's thread, at the very end
};

class Attempt {
 public:
  enum class End {
    kForget,    // the coordinator does not want it any more: stop, report nothing
    kFence,     // the lease may have run out: as kForget, unless the task has ended and only its report is missing
    kDrain,     // this worker stops: report it as an INFRA failure
  };

  Attempt(const AttemptContext& context, v1::Lease lease);
  ~Attempt();   // waits for the end

  const v1::LeaseToken& token() const { return lease_.token(); }
  bool finished() const { return finished_; }
  // Asks it to end; returns at once.
  void Stop(End end);

  // Progress, notes and log for the next Synchronize; Reported() says whether they have arrived.
  v1::RunningAttempt Report();
  void Reported(bool arrived);

 private:
  struct Work;     // folders of this attempt

  void Run();
  // Success, or why not; nullopt when nothing is to be reported.
  std::optional<v1::CompleteTaskRequest> Execute();
  StatusOr<Work> Prepare();
  StatusOr<ExitInfo> RunTask(const Work& work);
  StatusOr<v1::ArtifactRef> UploadOutputs(const Work& work);
  void OnEvent(const v1::TaskEvent& event);
  v1::TaskError ErrorOf(const ExitInfo& info, uint64_t out_of_memory_kills) const;
  void Complete(v1::CompleteTaskRequest request);
  void SetPhase(const std::string& phase);
  // Moves artifacts until `cancelled`, and waits for the coordinator until the attempt is stopped.
  ArtifactClient MakeArtifactClient(std::function<bool()> cancelled);
  // Whether a call is of no use any more: nobody wants this attempt, or the worker stops and has waited long enough for the answer.
  std::function<bool()> UntilGivenUp() const;
  bool Forgotten() const;
  bool Stopped() const;
  void Log(const std::string& line);

  const AttemptContext& context_;
  v1::Lease lease_;
  const std::string kind_;
  const uint32_t meeting_port_;            // that this attempt listens on for its gang; 0 = none
  LogBuffer log_;
  TaskProcess process_;
  std::atomic<bool> forget_{false};
  std::atomic<bool> drain_{false};
  std::atomic<bool> task_ended_{false};    // the process has done its work; outputs or report are on their way
  std::atomic<bool> finished_{false};
  std::atomic<bool> waited_{false};        // the log says already what for

  mutable std::mutex mutex_;               // guards what follows
  std::condition_variable reported_;
  v1::TaskProgress progress_;
  std::vector<v1::Measurement> measurements_;
  std::optional<v1::TaskError> error_;
  std::vector<v1::Note> notes_;
  size_t notes_in_flight_ = 0;
  uint64_t log_in_flight_ = 0;             // end offset
  bool in_flight_ = false;                 // a Report() with a log part or notes has no answer yet
  bool completing_ = false;
  std::thread thread_;                     // last: it uses the members above
};

// "train" for a TaskSpec with train parameters.
std::string KindName(const v1::TaskSpec& spec);

}  // namespace refinery::agent
