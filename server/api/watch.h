// server/api/watch.h
//
// Server streams that follow a job: durable events (with progress in between) and the logs of its attempts. Both pull: a
// cursor stands at what was sent last, and the next message is fetched when the one before has left. So a slow reader costs a
// cursor and one page of events, never a queue, and there is no gap and no duplicate by construction.
//
// Threads: the coordinator's loop does everything; gRPC's threads only post to it.

#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/server_callback.h>

#include <map>
#include <memory>
#include <string>
#include <utility>

#include "common/grpc_status.h"
#include "server/api/coordinator.h"
#include "server/api/visible.h"
#include "server/security/gate.h"

namespace refinery::api {

// What both have in common: one write at a time, one end.
template <typename Response>
class FollowStream : public grpc::ServerWriteReactor<Response>,
                     public Coordinator::Stream,
                     public std::enable_shared_from_this<FollowStream<Response>> {
 public:
  FollowStream(Coordinator* coordinator, std::shared_ptr<security::Call> call, std::string id)
      : coordinator_(coordinator), call_(std::move(call)), id_(std::move(id)) {}

  // Keeps the object alive until gRPC has let go of it, and starts it.
  static FollowStream* Start(std::shared_ptr<FollowStream> stream) {
    stream->self_ = stream;
    stream->coordinator_->Post([stream](Coordinator::Turn& turn) {
      turn.replies.push_back([stream](const Status&) { stream->coordinator_->AddStream(stream); });
    });
    return stream.get();
  }

  bool Pump(Coordinator&, const jobs::Now& now) final {
    if (writing_) return true;  // a cancelled call's write ends too
    if (cancelled_) {
      End(grpc::Status(grpc::StatusCode::CANCELLED, "the caller went away"));
    } else if (stopping_) {
      End(ToGrpc(Unavailable("the coordinator is shutting down; call again to go on from here")));
    } else {
      const StatusOr<const jobs::JobState*> job = FindJob(coordinator_->core().state(), call_->principal(), id_);
      if (job.ok()) {
        id_ = (*job)->id;  // a prefix must not become ambiguous while the stream runs
        Next(**job, now);
      } else {
        End(ToGrpc(job.status()));
      }
    }
    return !finished_;
  }
  void Stop() final { stopping_ = true; }
  const std::string& job() const final { return id_; }

  void OnWriteDone(bool ok) final {
    coordinator_->Post([self = self_, ok](Coordinator::Turn&) {
      self->writing_ = false;
      self->Wake();
      if (!ok) self->cancelled_ = true;
    });
  }
  // Beside everything but OnDone, so `self_` is not looked at.
  void OnCancel() final {
    coordinator_->Post([self = this->shared_from_this()](Coordinator::Turn&) {
      self->cancelled_ = true;
      self->Wake();
    });
  }
  void OnDone() final { const std::shared_ptr<FollowStream> last = std::move(self_); }

 protected:
  // Sends the next message, ends the stream, or does nothing when there is nothing to send.
  virtual void Next(const jobs::JobState& job, const jobs::Now& now) = 0;

  void Send() {
    writing_ = true;
    this->StartWrite(&message_);
  }
  void End(const grpc::Status& status) {
    if (finished_) return;
    finished_ = true;
    this->Finish(status);
  }

  bool finished() const { return finished_; }

  Coordinator* const coordinator_;
  Response message_;

 private:
  const std::shared_ptr<security::Call> call_;
  std::string id_;
  std::shared_ptr<FollowStream> self_;
  bool stopping_ = false;
  bool writing_ = false;
  bool cancelled_ = false;
  bool finished_ = false;
};

// JobService.WatchJob.
class WatchStream final : public FollowStream<v1::WatchJobResponse> {
 public:
  WatchStream(Coordinator* coordinator, std::shared_ptr<security::Call> call, std::string id, uint64_t after_seq)
      : FollowStream(coordinator, std::move(call), std::move(id)), cursor_(after_seq) {}

 protected:
  void Next(const jobs::JobState& job, const jobs::Now& now) override;

 private:
  bool NextEvent(const jobs::JobState& job);
  bool NextProgress(const jobs::JobState& job, const jobs::Now& now);

  uint64_t cursor_;                  // last event sent
  Coordinator::EventPage page_;      // events after it, already read, from page_next_ on
  size_t page_next_ = 0;
  struct Sent {
    uint64_t version = 0;
    Milliseconds time{-1'000'000};
  };
  std::map<size_t, Sent> progress_;  // position of the task -> last progress sent
  Milliseconds last_sent_{0};
};

// JobService.TailLogs.
class TailStream final : public FollowStream<v1::LogChunk> {
 public:
  // An empty `path` means every task.
  TailStream(Coordinator* coordinator, std::shared_ptr<security::Call> call, std::string id, std::string path, bool follow)
      : FollowStream(coordinator, std::move(call), std::move(id)), path_(std::move(path)), follow_(follow) {}

 protected:
  void Next(const jobs::JobState& job, const jobs::Now& now) override;

 private:
  const std::string path_;
  const bool follow_;
  std::map<std::pair<std::string, uint32_t>, uint64_t> sent_;  // (path, attempt) -> bytes
};

}  // namespace refinery::api
