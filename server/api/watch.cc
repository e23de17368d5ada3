#include "server/api/watch.h"

namespace refinery::api {
namespace {

constexpr int kEventsPerPage = 128;
constexpr Milliseconds kProgressEvery{500};  // for each task

}  // namespace

void WatchStream::Next(const jobs::JobState& job, const jobs::Now& now) {
  if (last_sent_ == Milliseconds{0}) last_sent_ = now.steady;
  message_.Clear();
  const bool has_event = NextEvent(job);
  if (finished()) return;
  if (has_event || NextProgress(job, now)) {
    last_sent_ = now.steady;
    return Send();
  }
  if (jobs::IsTerminal(job.state) && cursor_ >= job.last_seq) return End(grpc::Status::OK);
  if (now.steady - last_sent_ < coordinator_->options().watch_heartbeat) return;
  last_sent_ = now.steady;
  message_.mutable_heartbeat()->set_seq(std::max(cursor_, job.last_seq));
  Send();
}

bool WatchStream::NextEvent(const jobs::JobState& job) {
  if (page_next_ == page_.size()) {
    page_.clear();
    page_next_ = 0;
    if (job.last_seq <= cursor_) return false;
    StatusOr<Coordinator::EventPage> events = coordinator_->EventsOf(job, cursor_, kEventsPerPage);
    if (!events.ok()) {
      End(ToGrpc(events.status()));
      return false;
    }
    page_ = *std::move(events);
    if (page_.empty()) return false;
  }
  cursor_ = page_[page_next_]->seq();
  *message_.mutable_event() = *page_[page_next_];
  page_[page_next_++].reset();
  return true;
}

bool WatchStream::NextProgress(const jobs::JobState& job, const jobs::Now& now) {
  for (const size_t i : job.leased) {
    const jobs::TaskState& task = job.tasks[i];
    Sent& sent = progress_[i];
    if (task.progress_version <= sent.version || now.steady - sent.time < kProgressEvery) continue;
    sent = {.version = task.progress_version, .time = now.steady};
    v1::WatchJobResponse::Progress* progress = message_.mutable_progress();
    progress->set_path(job.plan.tasks[i].path);
    progress->set_attempt(task.attempt);
    *progress->mutable_progress() = task.progress;
    return true;
  }
  return false;
}

void TailStream::Next(const jobs::JobState& job, const jobs::Now&) {
  if (!path_.empty() && job.Find(path_) == nullptr) {
    return End(ToGrpc(NotFound("job ", job.id, " has no task ", path_, "; `refinery describe ", job.id, "` lists them")));
  }
  store::AttemptLogs& logs = coordinator_->logs();
  for (const store::AttemptLogs::Size& size : logs.List(job.id)) {
    if (!path_.empty() && size.path != path_) continue;
    uint64_t& sent = sent_[{size.path, size.attempt}];
    if (sent >= size.bytes) continue;
    StatusOr<std::string> text = logs.Read(job.id, size.path, size.attempt, sent, limits::kMaxLogChunkBytes);
    if (!text.ok()) return End(ToGrpc(text.status()));
    if (text->empty()) continue;
    message_.Clear();
    message_.set_path(size.path);
    message_.set_attempt(size.attempt);
    message_.set_offset(sent);
    sent += text->size();
    message_.set_text(*std::move(text));
    return Send();
  }
  const jobs::TaskState* task = job.Find(path_);
  if (!follow_ || jobs::IsTerminal(job.state) || (task != nullptr && jobs::IsSettled(task->state))) End(grpc::Status::OK);
}

}  // namespace refinery::api
