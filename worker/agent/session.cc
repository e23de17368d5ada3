#include "worker/agent/session.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>
#include <random>
#include <thread>

#include <spdlog/spdlog.h>

#include "common/files.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "worker/agent/coordinator_calls.h"
#include "worker/agent/machine.h"

namespace refinery::agent {
namespace {

using std::chrono::milliseconds;

constexpr milliseconds kFirstBackoff{100};
constexpr milliseconds kLongestBackoff{3'000};
constexpr milliseconds kBusyDeadline{5'000};       // so that the fence is looked at in time
constexpr milliseconds kLongestUnheard{1'000'000'000};
constexpr milliseconds kPollSlack{10'000};
constexpr milliseconds kGoodbyeDeadline{2'000};
constexpr int kMaxDefaultIds = 1000;

std::string HostName() {
  std::array<char, 256> name{};
  if (::gethostname(name.data(), name.size() - 1) != 0) return "worker";
  return name.data();
}

std::string RandomHex() {
  std::random_device device;
  std::array<char, 17> text{};
  std::snprintf(text.data(), text.size(), "%08x%08x", device(), device());
  return text.data();
}

bool IsId(const std::string& id) {
  return !id.empty() && id.size() <= 128 && id[0] != '.' &&
         std::all_of(id.begin(), id.end(),
                     [](unsigned char c) { return std::isalnum(c) || c == '-' || c == '_' || c == '.'; });
}

bool SameLease(const v1::LeaseToken& a, const v1::LeaseToken& b) {
  return a.job() == b.job() && a.path() == b.path() && a.epoch() == b.epoch();
}

// Whether the coordinator has refused this worker as it is, so that asking again is of no use.
bool IsRefusal(const Status& status) {
  return status.code() == absl::StatusCode::kInvalidArgument || status.code() == absl::StatusCode::kFailedPrecondition ||
         status.code() == absl::StatusCode::kUnimplemented || status.code() == absl::StatusCode::kPermissionDenied ||
         status.code() == absl::StatusCode::kUnauthenticated;
}

}  // namespace

Session::Session(SessionOptions options)
    : options_(std::move(options)),
      artifacts_(options_.cache / "artifacts"),
      ports_(options_.slots),
      stub_(v1::WorkerService::NewStub(options_.channel)),
      incarnation_(RandomHex()),
      lease_ttl_(limits::kLeaseTtl),
      interval_(limits::kSynchronizeInterval),
      backoff_(kFirstBackoff),
      heard_(Clock::now()),
      renewed_(heard_) {}

Session::~Session() {
  for (auto& attempt : attempts_) attempt->Stop(Attempt::End::kForget);
  attempts_.clear();
  if (lock_fd_ >= 0) ::close(lock_fd_);
}

StatusOr<std::unique_ptr<Session>> Session::Open(SessionOptions options) {
  if (::access(options.task_program.c_str(), X_OK) != 0) {
    return NotFound("cannot run the task program ", options.task_program.string(), ": ", std::strerror(errno),
                    "; build refinery-task or name it with --task-program");
  }
  if (!options.id.empty() && !IsId(options.id))
    return InvalidArgument("the worker id '", options.id, "' may hold letters, digits, '-', '_' and '.' only");
  RF_RETURN_IF_ERROR(CheckLabels(options.labels));
  std::unique_ptr<Session> session(new Session(std::move(options)));
  RF_RETURN_IF_ERROR(session->Lock());
  const SessionOptions& o = session->options_;
  session->context_ = {.channel = o.channel,
                       .artifacts = &session->artifacts_,
                       .ports = &session->ports_,
                       .metrics = o.metrics,
                       .cache = o.cache,
                       .work = o.cache / "work" / o.id,
                       .task_program = o.task_program,
                       .threads = o.threads,
                       .stop_grace = o.stop_grace,
                       .transfers = o.transfers,
                       .on_finished = [s = session.get()] {
                         std::lock_guard<std::mutex> lock(s->mutex_);
                         s->attempt_ended_ = true;
                         s->wake_.notify_all();
                       }};
  v1::WorkerInfo& info = session->info_;
  info.set_id(o.id);
  DescribeMachine(&info);
  info.set_threads(o.threads * o.slots);
  info.set_version(REFINERY_VERSION);
  info.set_address(o.address.empty() ? info.host() : o.address);
  info.mutable_labels()->insert(o.labels.begin(), o.labels.end());
  return session;
}

Status Session::Lock() {
  const std::filesystem::path work = options_.cache / "work";
  RF_RETURN_IF_ERROR(CreateFolders(work));
  const bool given = !options_.id.empty();
  for (int n = 1; n <= (given ? 1 : kMaxDefaultIds); ++n) {
    std::string id = given ? options_.id : Join(HostName(), "-", n);
    std::filesystem::path path = work / (id + ".lock");
    int fd = ::open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
    if (fd < 0) return FailedPrecondition("cannot write ", path.string(), ": ", std::strerror(errno));
    if (::flock(fd, LOCK_EX | LOCK_NB) == 0) {
      lock_fd_ = fd;
      options_.id = std::move(id);
      std::error_code error;
      std::filesystem::remove_all(work / options_.id, error);
      return absl::OkStatus();
    }
    ::close(fd);
  }
  return AlreadyExists("a worker with the id '", options_.id, "' runs already with the cache ", options_.cache.string(),
                       "; give another --id or --cache");
}

void Session::Stop() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (stopping_) return;
  stopping_ = true;
  stop_time_ = Clock::now();
  if (poll_ != nullptr) poll_->TryCancel();
  wake_.notify_all();
}

bool Session::stopping() {
  std::lock_guard<std::mutex> lock(mutex_);
  return stopping_;
}

Status Session::Run() {
  spdlog::info("worker {} asks {} for work ({} at a time, {} threads each)", options_.id, options_.coordinator,
               options_.slots, options_.threads);
  while (true) {
    Reap();
    if (stopping()) {
      if (attempts_.empty()) break;
      Drain();
    }
    RF_RETURN_IF_ERROR(Step());
  }
  SayGoodbye();
  spdlog::info("worker {} stopped", options_.id);
  return absl::OkStatus();
}

Status Session::Step() {
  const bool idle = attempts_.empty() && !stopping();
  const Clock::time_point sent = Clock::now();
  StatusOr<v1::SynchronizeResponse> response = Synchronize(idle);
  for (auto& attempt : attempts_) attempt->Reported(response.ok() && !response->repeat_report());
  if (!response.ok()) {
    if (IsRefusal(response.status()) && !ever_connected_)
      return Annotate(response.status(), Join("the coordinator at ", options_.coordinator, " refuses this worker"));
    HandleFailure(response.status());
    return absl::OkStatus();
  }
  heard_ = Clock::now();
  if (!response->not_renewed()) renewed_ = sent;
  backoff_ = kFirstBackoff;
  if (!connected_) spdlog::info("connected to {}", options_.coordinator);
  connected_ = ever_connected_ = true;
  told_ = !response->tell_worker();
  options_.metrics->Heartbeat();
  Apply(*response);
  if (!attempts_.empty()) {
    Sleep(response->grants_size() > 0 || response->not_renewed() ? milliseconds(0) : interval_);
  } else if (Clock::now() - sent < milliseconds(50)) {
    Sleep(kFirstBackoff);   // a long poll that came back at once with nothing: do not spin
  }
  return absl::OkStatus();
}

StatusOr<v1::SynchronizeResponse> Session::Synchronize(bool idle) {
  grpc::ClientContext context;
  // A busy worker must be back in time to look at its fence.
  const auto to_fence = std::chrono::duration_cast<milliseconds>(FenceTime() - Clock::now());
  context.set_deadline(std::chrono::system_clock::now() + (idle ? limits::kLongPoll + kPollSlack
                                                                : std::clamp(to_fence, kFirstBackoff, kBusyDeadline)));
  v1::SynchronizeRequest request = MakeRequest(stopping());
  {
    std::lock_guard<std::mutex> lock(mutex_);
    if (idle && stopping_) return Cancelled("stopping");
    if (idle) poll_ = &context;
  }
  v1::SynchronizeResponse response;
  Status status = FromGrpc(stub_->Synchronize(&context, request, &response));
  std::lock_guard<std::mutex> lock(mutex_);
  poll_ = nullptr;
  if (!status.ok()) return status;
  return response;
}

void Session::Describe(v1::WorkerInfo* worker) {
  const std::vector<std::string> cached = artifacts_.Newest(limits::kMaxReportedArtifacts);
  if (!std::equal(cached.begin(), cached.end(), info_.cached().begin(), info_.cached().end())) {
    info_.mutable_cached()->Assign(cached.begin(), cached.end());
    told_ = false;
  }
  if (const std::vector<uint32_t> ports = ports_.Ports(); !std::equal(ports.begin(), ports.end(), info_.ports().begin(),
                                                                      info_.ports().end())) {
    info_.mutable_ports()->Assign(ports.begin(), ports.end());
    told_ = false;
  }
  if (told_) {
    worker->set_id(info_.id());
    worker->set_brief(true);
  } else {
    *worker = info_;
  }
  worker->set_free_disk_bytes(FreeDiskBytes(options_.cache));
}

v1::SynchronizeRequest Session::MakeRequest(bool stopping) {
  v1::SynchronizeRequest request;
  Describe(request.mutable_worker());
  request.mutable_worker()->set_state(stopping ? "draining" : attempts_.empty() ? "idle" : "busy");
  request.set_incarnation(incarnation_);
  request.set_revision(++revision_);
  const auto unheard = std::chrono::duration_cast<milliseconds>(Clock::now() - heard_);
  request.set_unheard_ms(static_cast<uint32_t>(std::min(unheard, kLongestUnheard).count()));
  for (auto& attempt : attempts_) {
    *request.add_running() = attempt->Report();
    request.mutable_worker()->add_running(Join(attempt->token().job(), "/", attempt->token().path()));
  }
  uint32_t running = static_cast<uint32_t>(attempts_.size());
  // After a failed call the answers may be what is lost: a lease that nobody hears of would hold its task up for a lease's life.
  const bool answers_arrive = connected_ || !ever_connected_;
  request.set_free_slots(stopping || !answers_arrive || running >= options_.slots ? 0 : options_.slots - running);
  return request;
}

void Session::Apply(const v1::SynchronizeResponse& response) {
  if (response.lease_ttl_ms() > 0) lease_ttl_ = milliseconds(response.lease_ttl_ms());
  interval_ = response.next_synchronize_ms() > 0 ? milliseconds(response.next_synchronize_ms())
                                                 : limits::kSynchronizeInterval;
  interval_ = std::min(interval_, lease_ttl_ / 3);
  for (const v1::LeaseToken& token : response.cancel()) {
    for (auto& attempt : attempts_) {
      if (!SameLease(attempt->token(), token)) continue;
      spdlog::info("the coordinator cancels {} of job {}", token.path(), token.job());
      attempt->Stop(Attempt::End::kForget);
    }
  }
  // An answer that was very long on its way brings leases that may be over already; they run out unused.
  const bool in_time = Clock::now() < FenceTime();
  for (const v1::Lease& lease : response.grants()) {
    if (!in_time) {
      spdlog::warn("the lease of {} (job {}) came too late", lease.token().path(), lease.token().job());
      continue;
    }
    bool known = std::any_of(attempts_.begin(), attempts_.end(),
                             [&](const auto& attempt) { return SameLease(attempt->token(), lease.token()); });
    if (!known) attempts_.push_back(std::make_unique<Attempt>(context_, lease));
  }
}

void Session::HandleFailure(const Status& status) {
  if (stopping() && attempts_.empty()) return;
  if (connected_ || !ever_connected_) {
    if (backoff_ == kFirstBackoff)
      spdlog::warn("no answer from the coordinator at {}: {}; trying again", options_.coordinator, Message(status));
  }
  connected_ = false;
  Fence();
  Sleep(backoff_);
  backoff_ = std::min(backoff_ * 2, attempts_.empty() ? kLongestBackoff : interval_);
}

Session::Clock::time_point Session::FenceTime() const {
  return renewed_ + lease_ttl_ - limits::FenceMargin(lease_ttl_);
}

void Session::Fence() {
  if (attempts_.empty() || Clock::now() < FenceTime()) return;
  for (auto& attempt : attempts_) {
    if (attempt->finished()) continue;
    spdlog::warn("no coordinator for {} ms: the lease of {} (job {}) may have run out", lease_ttl_.count(),
                 attempt->token().path(), attempt->token().job());
    attempt->Stop(Attempt::End::kFence);
  }
}

void Session::Reap() {
  attempts_.remove_if([](const auto& attempt) { return attempt->finished(); });
}

void Session::Drain() {
  Clock::time_point deadline;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    deadline = stop_time_ + options_.drain_grace;
  }
  if (drained_ || Clock::now() < deadline) return;
  drained_ = true;
  for (auto& attempt : attempts_) attempt->Stop(Attempt::End::kDrain);
}

// So that the coordinator need not wait for a lease to run out.
void Session::SayGoodbye() {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + kGoodbyeDeadline);
  v1::SynchronizeResponse response;
  (void)stub_->Synchronize(&context, MakeRequest(/*stopping=*/true), &response);
}

void Session::Sleep(milliseconds wait) {
  std::unique_lock<std::mutex> lock(mutex_);
  Clock::time_point until = Clock::now() + wait;
  if (stopping_ && !drained_) until = std::min(until, std::max(Clock::now(), stop_time_ + options_.drain_grace));
  bool was_stopping = stopping_;
  wake_.wait_until(lock, until, [&] { return attempt_ended_ || stopping_ != was_stopping; });
  attempt_ended_ = false;
}

}  // namespace refinery::agent
