#include "client/follow.h"

#include <unistd.h>

#include <algorithm>
#include <iostream>

#include "client/render/job_text.h"
#include "client/render/json.h"
#include "client/render/progress_view.h"
#include "common/grpc_status.h"

namespace refinery::client {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::milliseconds;

constexpr milliseconds kTick{200};
constexpr milliseconds kRefresh{500};
constexpr milliseconds kReconnect{300};
constexpr size_t kMaxQueued = 10'000;

bool IsAway(const Status& status) {
  return status.code() == absl::StatusCode::kUnavailable || status.code() == absl::StatusCode::kDeadlineExceeded ||
         status.code() == absl::StatusCode::kCancelled || status.code() == absl::StatusCode::kUnknown ||
         status.code() == absl::StatusCode::kResourceExhausted;   // a slow reader is asked to come again
}

}  // namespace

JobStream::JobStream(std::shared_ptr<grpc::Channel> channel, std::string job, uint64_t after_seq)
    : channel_(std::move(channel)), job_(std::move(job)), after_seq_(after_seq), thread_([this] { Loop(); }) {}

JobStream::~JobStream() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    closing_ = true;
    if (context_ != nullptr) context_->TryCancel();
    changed_.notify_all();
  }
  thread_.join();
}

void JobStream::Loop() {
  auto stub = v1::JobService::NewStub(channel_);
  std::unique_lock<std::mutex> lock(mutex_);
  while (!closing_) {
    grpc::ClientContext context;
    context_ = &context;
    v1::WatchJobRequest request;
    request.set_id(job_);
    request.set_after_seq(after_seq_);
    lock.unlock();
    auto stream = stub->WatchJob(&context, request);
    v1::WatchJobResponse item;
    while (stream->Read(&item)) {
      lock.lock();
      away_since_.reset();
      if (item.has_event()) after_seq_ = item.event().seq();
      items_.push_back(item);
      changed_.notify_all();
      changed_.wait(lock, [&] { return items_.size() < kMaxQueued || closing_; });
      lock.unlock();
    }
    Status status = FromGrpc(stream->Finish());
    lock.lock();
    context_ = nullptr;
    ended_ = status.ok();
    if (!status.ok() && !IsAway(status)) error_ = status;
    changed_.notify_all();
    if (ended_ || !error_.ok()) return;
    if (!away_since_.has_value()) away_since_ = Clock::now();
    changed_.wait_for(lock, kReconnect, [&] { return closing_; });
  }
}

std::optional<v1::WatchJobResponse> JobStream::Next(milliseconds wait) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_for(lock, wait, [&] { return !items_.empty() || ended_ || !error_.ok(); });
  if (items_.empty()) return std::nullopt;
  v1::WatchJobResponse item = std::move(items_.front());
  items_.pop_front();
  changed_.notify_all();
  return item;
}

bool JobStream::ended() {
  std::lock_guard<std::mutex> lock(mutex_);
  return ended_ && items_.empty();
}

Status JobStream::error() {
  std::lock_guard<std::mutex> lock(mutex_);
  return error_;
}

milliseconds JobStream::away() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!away_since_.has_value()) return milliseconds(0);
  return std::chrono::duration_cast<milliseconds>(Clock::now() - *away_since_);
}

namespace {

// One run of FollowJob.
class Follower {
 public:
  Follower(Connection& connection, v1::Job job, const FollowOptions& options)
      : connection_(connection),
        options_(options),
        job_(std::move(job)),
        stream_(connection.channel, job_.id(), options.json ? options.after_seq : job_.as_of_seq()),
        view_(STDERR_FILENO) {
    view_.SetJob(job_);
  }

  StatusOr<v1::Job> Run() {
    while (!stream_.ended()) {
      if (options_.interrupt != nullptr && options_.interrupt->raised()) return Cancelled("detached from the job");
      RF_RETURN_IF_ERROR(stream_.error());
      if (stream_.away() > options_.patience) {
        return Unavailable("the coordinator at ", connection_.address, " has not answered for ",
                           options_.patience.count() / 1000, " s; is it still running?");
      }
      if (auto item = stream_.Next(kTick); item.has_value()) Take(*item);
      RF_RETURN_IF_ERROR(Tick());
    }
    view_.Clear();
    RF_ASSIGN_OR_RETURN(v1::Job job, FinalJob());
    if (!IsFinal(job.state())) return Internal("the coordinator ended the watch of a job that is ", StateName(job.state()));
    return job;
  }

 private:
  // The coordinator may die between the last event and this question.
  StatusOr<v1::Job> FinalJob() {
    const Clock::time_point deadline = Clock::now() + options_.patience;
    while (true) {
      StatusOr<v1::Job> job = GetJob(connection_, job_.id());
      if (job.ok() || !IsAway(job.status()) || Clock::now() > deadline) return job;
      if (options_.supervise) RF_RETURN_IF_ERROR(options_.supervise().status());
      std::this_thread::sleep_for(kReconnect);
    }
  }

  void Take(const v1::WatchJobResponse& item) {
    if (item.has_event()) {
      dirty_ = true;
      if (options_.json) std::cout << ToJson(item.event(), JsonForm::kLine) << std::flush;
      else view_.OnEvent(item.event());
    } else if (item.has_progress() && !options_.json) {
      view_.OnProgress(item.progress());
    }
  }

  Status Tick() {
    if (Clock::now() < next_tick_) return absl::OkStatus();
    next_tick_ = Clock::now() + kTick;
    if (options_.supervise) {
      RF_ASSIGN_OR_RETURN(std::string remark, options_.supervise());
      if (!remark.empty()) view_.Note(remark);
    }
    if (options_.json) return absl::OkStatus();
    view_.SetWaiting(stream_.away() > milliseconds(2000)
                         ? Join("waiting for the coordinator at ", connection_.address) : "");
    if (dirty_ && Clock::now() >= next_refresh_ && stream_.away() == milliseconds(0)) {
      next_refresh_ = Clock::now() + kRefresh;
      if (auto job = GetJob(connection_, job_.id()); job.ok()) {
        dirty_ = false;
        view_.SetJob(*job);
      }
    }
    view_.Tick();
    return absl::OkStatus();
  }

  Connection& connection_;
  const FollowOptions& options_;
  v1::Job job_;
  JobStream stream_;
  ProgressView view_;
  bool dirty_ = false;
  Clock::time_point next_tick_{};
  Clock::time_point next_refresh_{};
};

}  // namespace

StatusOr<v1::Job> FollowJob(Connection& connection, const std::string& id, const FollowOptions& options) {
  RF_ASSIGN_OR_RETURN(v1::Job job, GetJob(connection, id));
  if (IsFinal(job.state()) && !options.json) return job;
  return Follower(connection, std::move(job), options).Run();
}

}  // namespace refinery::client
