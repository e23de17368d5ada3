#include "tests/bench/coordinator_load.h"

#include <condition_variable>

#include "common/digest.h"
#include "common/grpc_status.h"
#include "server/jobs/core.h"
#include "server/store/event_log.h"
#include "server/store/snapshots.h"
#include "tests/bench/coordinator_fleet.h"

namespace refinery::bench {
namespace {

constexpr size_t kEventsPerBatch = 20'000;

// The core and its log, as the coordinator ties them together.
class History {
 public:
  History(const std::filesystem::path& state, const LongLogOptions& options)
      : state_(state), options_(options), log_(Must(store::EventLog::Open(state), "opening the log")),
        core_(jobs::CoreOptions{.lease_ttl = std::chrono::hours(1'000'000), .code_version = REFINERY_VERSION}) {}

  LongLog Make() {
    std::vector<std::string> ids;
    for (uint32_t i = 0; i < options_.jobs; ++i) {
      jobs::Core::NewJob job{.id = Join("history-", 100 + i)};
      *job.created.mutable_recipe() = WideRecipe(i + 1, options_.shards);
      for (const char* role : {"seeds", "benchmark/arc_easy"}) (*job.created.mutable_files())[role] = DigestOf(role);
      ids.push_back(Must(core_.CreateJob(job, now_, &events_), "creating a job"));
    }
    LongLog made;
    for (const std::string& id : ids) made.tasks += core_.state().jobs.at(id).tasks.size();
    const uint64_t each = options_.events / (made.tasks - 20 * ids.size()) + 1;  // events of one task
    for (const std::string& id : ids) {
      Play(id, "import/student", each);
      for (uint32_t shard = 0; shard < options_.shards; ++shard) Play(id, Join("synthesize/", shard), each);
      for (uint32_t shard = 0; shard + 1 < options_.shards; ++shard) Play(id, Join("critique/", shard), each);
    }
    Flush();
    made.events = log_->last_seq();
    made.last_job = ids.back();
    made.last_job_done = 2 * options_.shards;
    return made;
  }

 private:
  void Play(const std::string& job, const std::string& path, uint64_t events) {
    const v1::Lease lease = Must(core_.Grant(job, path, "w1", "i1", now_, &events_), "granting");
    for (uint64_t step = 1; step + 2 <= events; ++step) {
      v1::CommitCheckpointRequest checkpoint;
      *checkpoint.mutable_lease() = lease.token();
      checkpoint.set_step(step);
      checkpoint.mutable_checkpoint()->set_digest(DigestOf(Join(path, step)));
      Must(core_.CommitCheckpoint(checkpoint, now_, &events_), "committing a checkpoint");
    }
    v1::CompleteTaskRequest complete;
    *complete.mutable_lease() = lease.token();
    complete.mutable_success()->mutable_output()->set_digest(DigestOf(Join(job, path)));
    Must(core_.Complete(complete, now_, &events_), "completing");
    if (events_.size() >= kEventsPerBatch) Flush();
  }

  void Flush() {
    Must(log_->Append(events_), "appending");
    events_.clear();
    if (snapshot_ || log_->last_seq() + options_.after_snapshot < options_.events) return;
    Must(store::WriteSnapshot(state_, log_->last_seq(), core_.Snapshot()), "writing the snapshot");
    snapshot_ = true;
  }

  const std::filesystem::path state_;
  const LongLogOptions options_;
  std::unique_ptr<store::EventLog> log_;
  jobs::Core core_;
  jobs::Now now_{.steady = std::chrono::milliseconds(1), .unix_ms = 1'700'000'000'000};
  jobs::Events events_;
  bool snapshot_ = false;
};

}  // namespace

LongLog MakeLongLog(const std::filesystem::path& state, const LongLogOptions& options) {
  return History(state, options).Make();
}

class Watcher::Reader final : public grpc::ClientReadReactor<v1::WatchJobResponse> {
 public:
  Reader(v1::JobService::Stub* stub, const std::string& job) {
    request_.set_id(job);
    stub->async()->WatchJob(&context_, &request_, this);
  }
  void Begin() {
    StartRead(&response_);
    StartCall();
  }
  void OnReadDone(bool ok) override {
    if (!ok) return;
    if (response_.has_event()) {
      std::lock_guard lock(mutex_);
      seen_.push_back(response_.event().seq());
    }
    StartRead(&response_);
  }
  void OnDone(const grpc::Status&) override {
    std::lock_guard lock(mutex_);
    done_ = true;
    wake_.notify_all();
  }
  std::vector<uint64_t> Seen() {
    std::lock_guard lock(mutex_);
    return seen_;
  }
  void Cancel() { context_.TryCancel(); }
  void Wait() {
    std::unique_lock lock(mutex_);
    wake_.wait(lock, [this] { return done_; });
  }

 private:
  grpc::ClientContext context_;
  v1::WatchJobRequest request_;
  v1::WatchJobResponse response_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<uint64_t> seen_;
  bool done_ = false;
};

Watcher::Watcher(const std::shared_ptr<grpc::Channel>& channel, const std::string& job)
    : stub_(v1::JobService::NewStub(channel)), reader_(std::make_shared<Reader>(stub_.get(), job)) {
  reader_->Begin();
}
Watcher::~Watcher() {
  reader_->Cancel();
  reader_->Wait();
}
std::vector<uint64_t> Watcher::Seen() { return reader_->Seen(); }
void Watcher::Cancel() { reader_->Cancel(); }

SlowWatcher::SlowWatcher(const std::shared_ptr<grpc::Channel>& channel, const std::string& job, double bytes_per_second)
    : stub_(v1::JobService::NewStub(channel)), thread_([this, job, bytes_per_second] { Run(job, bytes_per_second); }) {}

SlowWatcher::~SlowWatcher() {
  if (thread_.joinable()) Stop();
}

void SlowWatcher::Run(const std::string& job, double bytes_per_second) {
  v1::WatchJobRequest request;
  request.set_id(job);
  const auto reader = stub_->WatchJob(&context_, request);
  v1::WatchJobResponse response;
  while (!stopping_ && reader->Read(&response)) {
    if (response.has_event()) seen_.push_back(response.event().seq());
    const double seconds = static_cast<double>(response.ByteSizeLong()) / bytes_per_second;
    const Clock::time_point until = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
    while (!stopping_ && Clock::now() < until) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  context_.TryCancel();
  reader->Finish();
}

std::vector<uint64_t> SlowWatcher::Stop() {
  stopping_ = true;
  thread_.join();
  return seen_;
}

std::vector<uint64_t> EventsOf(const std::shared_ptr<grpc::Channel>& channel, const std::string& job, uint64_t after_seq) {
  const auto stub = v1::JobService::NewStub(channel);
  v1::Job now;
  {
    grpc::ClientContext context;
    v1::GetJobRequest request;
    request.set_id(job);
    Must(FromGrpc(stub->GetJob(&context, request, &now)), "asking for the job");
  }
  std::vector<uint64_t> seqs;
  if (now.as_of_seq() <= after_seq) return seqs;
  grpc::ClientContext context;
  v1::WatchJobRequest request;
  request.set_id(job);
  request.set_after_seq(after_seq);
  const auto reader = stub->WatchJob(&context, request);
  v1::WatchJobResponse response;
  while ((seqs.empty() || seqs.back() < now.as_of_seq()) && reader->Read(&response)) {
    if (response.has_event()) seqs.push_back(response.event().seq());
  }
  context.TryCancel();
  reader->Finish();
  return seqs;
}

void PlayOne(const std::shared_ptr<grpc::Channel>& channel, const std::string& output) {
  const auto stub = v1::WorkerService::NewStub(channel);
  v1::SynchronizeRequest request;
  request.mutable_worker()->set_id("player");
  request.set_incarnation("1");
  request.set_free_slots(1);
  grpc::ClientContext context;
  v1::SynchronizeResponse response;
  Must(FromGrpc(stub->Synchronize(&context, request, &response)), "asking for a lease");
  for (const v1::Lease& lease : response.grants()) {
    v1::CompleteTaskRequest complete;
    *complete.mutable_lease() = lease.token();
    complete.mutable_success()->mutable_output()->set_digest(output);
    grpc::ClientContext complete_context;
    v1::CompleteTaskResponse answer;
    Must(FromGrpc(stub->CompleteTask(&complete_context, complete, &answer)), "completing a task");
  }
}

}  // namespace refinery::bench
