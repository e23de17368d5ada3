#include "server/api/coordinator.h"

#include <spdlog/spdlog.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <exception>

#include "common/error_details.h"
#include "server/scheduler/schedule.h"
#include "server/store/artifacts.h"
#include "server/store/failpoint.h"
#include "server/store/snapshots.h"

namespace refinery::api {
namespace {

constexpr size_t kMaxCommandsPerTurn = 256;
constexpr Milliseconds kTick{100};
constexpr Milliseconds kMetricsEvery{1'000};
constexpr Milliseconds kReportRetry{5'000};
constexpr int kMaxReportFailures = 5;

// The path of the task an event is about; "" when it is about none.
std::string PathOf(const v1::Event& event) {
  switch (event.kind_case()) {
    case v1::Event::kTaskLeased: return event.task_leased().path();
    case v1::Event::kTaskFinished: return event.task_finished().path();
    case v1::Event::kTaskFailed: return event.task_failed().path();
    case v1::Event::kLeaseExpired: return event.lease_expired().path();
    case v1::Event::kLeaseReleased: return event.lease_released().path();
    case v1::Event::kArtifactLost: return event.artifact_lost().path();
    case v1::Event::kCheckpointCommitted: return event.checkpoint_committed().path();
    case v1::Event::kTaskNote: return event.task_note().path();
    default: return "";
  }
}

// What a person wants to know of an event beside its kind and task.
std::string DetailOf(const v1::Event& event) {
  switch (event.kind_case()) {
    case v1::Event::kTaskLeased:
      return Join("worker=", event.task_leased().worker(), " epoch=", event.task_leased().epoch());
    case v1::Event::kTaskFinished:
      return Join("seconds=", event.task_finished().seconds(), " cached=", event.task_finished().cached() ? 1 : 0);
    case v1::Event::kTaskFailed:
      return Join("class=", v1::FailureClass_Name(event.task_failed().error().failure_class()), " retry=",
                  event.task_failed().retry() ? 1 : 0, " error=\"", event.task_failed().error().message(), "\"");
    case v1::Event::kLeaseExpired: return Join("reason=\"", event.lease_expired().reason(), "\"");
    case v1::Event::kLeaseReleased: return Join("reason=\"", event.lease_released().reason(), "\"");
    case v1::Event::kArtifactLost:
      return Join("artifact=", event.artifact_lost().digest(), " checkpoint=", event.artifact_lost().checkpoint() ? 1 : 0);
    case v1::Event::kCheckpointCommitted: return Join("step=", event.checkpoint_committed().step());
    case v1::Event::kTaskNote: return Join("code=", event.task_note().note().code());
    case v1::Event::kTrialSuggested: return Join("trial=", event.trial_suggested().trial().index());
    case v1::Event::kTrialFinished:
      return Join("trial=", event.trial_finished().trial().index(), " mean=", event.trial_finished().trial().mean());
    case v1::Event::kJobFinished:
      return Join("outcome=", v1::JobFinished::Outcome_Name(event.job_finished().outcome()), " reason=\"",
                  event.job_finished().reason(), "\"");
    default: return "";
  }
}

std::string KindOf(const v1::Event& event) {
  const auto* field = v1::Event::descriptor()->FindFieldByNumber(event.kind_case());
  return field == nullptr ? "unknown" : field->name();
}

}  // namespace

jobs::Now ReadClocks() {
  using std::chrono::duration_cast;
  return {.steady = duration_cast<Milliseconds>(std::chrono::steady_clock::now().time_since_epoch()),
          .unix_ms = duration_cast<Milliseconds>(std::chrono::system_clock::now().time_since_epoch()).count()};
}

Coordinator::Coordinator(CoordinatorOptions options)
    : options_(std::move(options)), logs_(options_.state), fleet_(options_.lease_ttl) {}

StatusOr<std::unique_ptr<Coordinator>> Coordinator::Open(CoordinatorOptions options) {
  std::unique_ptr<Coordinator> coordinator(new Coordinator(std::move(options)));
  RF_RETURN_IF_ERROR(coordinator->Start());
  return coordinator;
}

Status Coordinator::Start() {
  RF_CHECK(options_.make_report != nullptr);
  RF_ASSIGN_OR_RETURN(log_, store::EventLog::Open(options_.state));
  RF_ASSIGN_OR_RETURN(blobs_, store::BlobStore::Open(options_.state, {.read_only = options_.disk_read_only,
                                                                      .space_of = options_.space_of}));
  core_ = std::make_unique<jobs::Core>(
      jobs::CoreOptions{.lease_ttl = options_.lease_ttl,
                        .retry_backoff = options_.retry_backoff,
                        .code_version = options_.code_version,
                        .is_complete = [this](const std::string& digest) {
                          // What could not be looked at is not lost.
                          const Status status = store::CheckComplete(*blobs_, digest).status();
                          return !absl::IsFailedPrecondition(status) && !absl::IsNotFound(status) && !absl::IsDataLoss(status);
                        }});
  RF_RETURN_IF_ERROR(Recover());
  RF_ASSIGN_OR_RETURN(const std::vector<store::ArtifactOwner> owners, log_->ReadOwners());
  access_.Add(owners);
  spdlog::info("recovered events={} snapshot={} jobs={} unclean={}", log_->last_seq(), snapshot_seq_,
               core_->state().jobs.size(), log_->was_unclean() ? 1 : 0);
  check_due_ = log_->check_is_due();
  collected_ = ReadClocks().steady;
  Post([this](Turn& turn) { core_->StartGrace(turn.now, &turn.events); });
  thread_ = std::thread([this] { Run(); });
  return absl::OkStatus();
}

Status Coordinator::Recover() {
  snapshot_seq_ = 0;
  for (const uint64_t seq : store::ListSnapshots(options_.state)) {
    if (seq > log_->last_seq()) continue;  // of a log that is not here any more
    StatusOr<store::StoredSnapshot> snapshot = store::ReadSnapshotFile(options_.state, seq);
    const Status status = snapshot.ok() ? core_->Restore(snapshot->bytes) : snapshot.status();
    if (status.ok()) {
      snapshot_seq_ = seq;
      break;
    }
    spdlog::error("snapshot {} cannot be used, trying without it: {}", seq, Message(status));
  }
  return log_->Replay([this](const v1::Event& event) { return core_->Replay(event); }, snapshot_seq_);
}

Coordinator::~Coordinator() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  if (thread_.joinable()) thread_.join();
}

void Coordinator::Post(Command command) {
  {
    std::lock_guard lock(mutex_);
    commands_.push_back(std::move(command));
  }
  wake_.notify_one();
}

void Coordinator::BeginShutdown() {
  Post([this](Turn&) {
    draining_ = true;
    for (const std::shared_ptr<Stream>& stream : streams_) stream->Stop();
  });
}

void Coordinator::Run() {
  for (;;) {
    std::vector<Command> commands;
    {
      std::unique_lock lock(mutex_);
      wake_.wait_for(lock, kTick, [this] { return stopping_ || !commands_.empty(); });
      if (stopping_) return;
      while (!commands_.empty() && commands.size() < kMaxCommandsPerTurn) {
        commands.push_back(std::move(commands_.front()));
        commands_.pop_front();
      }
    }
    RunTurn(std::move(commands));
  }
}

void Coordinator::RunTurn(std::vector<Command> commands) {
  Turn turn{.core = *core_, .now = ReadClocks()};
  for (const Command& command : commands) command(turn);
  core_->Tick(turn.now, &turn.events);
  if (disk_ != Disk::kReadOnly) WriteReports(turn);
  if (!draining_ && !held_ && disk_ == Disk::kOk) GrantLeases(turn);
  for (Poll& poll : fleet_.Take(turn.now.steady, draining_)) turn.replies.push_back(std::move(poll.answer));
  const Status committed = Commit(turn);
  for (const auto& reply : turn.replies) reply(committed);
  if (!committed.ok()) turn.events.clear();
  Record(turn.events);
  PumpStreams(turn.now, std::move(turn.events));
  if (turn.now.steady - metrics_updated_ >= kMetricsEvery) {
    UpdateMetrics(turn.now);
    LookAfter(turn.now);
  }
}

void Coordinator::GrantLeases(Turn& turn) {
  if (core_->state().queues.empty()) return;
  // Without a free worker a pass can only take leases back for more urgent tasks: that need not happen in every turn.
  if (!fleet_.HasFree() && turn.now.steady - scheduled_ < kTick) return;
  scheduled_ = turn.now.steady;
  const scheduler::Pass pass = scheduler::Schedule(*core_, fleet_.Workers(turn.now.steady), turn.now);
  for (size_t i = 0; i < pass.grants.size(); ++i) {
    const scheduler::Decision& decision = pass.grants[i];
    if (decision.gang != 0) {
      const size_t first = i;
      while (i + 1 < pass.grants.size() && pass.grants[i + 1].gang == decision.gang) ++i;
      GrantGang(turn, {pass.grants.begin() + static_cast<ptrdiff_t>(first), pass.grants.begin() + static_cast<ptrdiff_t>(i) + 1});
      continue;
    }
    Poll* poll = fleet_.PollOf(decision.worker);
    StatusOr<v1::Lease> lease = core_->Grant(decision.job, decision.path, decision.worker, poll->incarnation, turn.now,
                                             &turn.events);
    if (!lease.ok()) continue;  // its result came out of the cache meanwhile
    *poll->response->add_grants() = *std::move(lease);
    --poll->free_slots;
  }
  for (const scheduler::Decision& decision : pass.preemptions) {
    core_->Preempt(decision.job, decision.path, "a task of higher priority waits for the worker");
  }
}

uint32_t Coordinator::MeetingPort(const std::string& worker) const {
  const v1::WorkerInfo* info = fleet_.InfoOf(worker);
  if (info == nullptr || info->address().empty()) return 0;
  std::set<uint32_t> taken;
  if (const auto leases = core_->state().worker_leases.find(worker); leases != core_->state().worker_leases.end()) {
    for (const auto& [job, i] : leases->second) taken.insert(core_->state().jobs.at(job).tasks[i].gang.port());
  }
  for (const uint32_t port : info->ports()) {
    if (!taken.contains(port)) return port;
  }
  return 0;
}

// All of them, in events of one transaction, or none.
void Coordinator::GrantGang(Turn& turn, std::vector<scheduler::Decision> members) {
  uint32_t port = 0;
  for (size_t m = 0; m < members.size() && port == 0; ++m) {
    port = MeetingPort(members[m].worker);
    if (port != 0) std::swap(members[0], members[m]);
  }
  const v1::WorkerInfo* first = fleet_.InfoOf(members[0].worker);
  std::vector<jobs::Core::Member> granted;
  for (const scheduler::Decision& member : members) {
    granted.push_back({member.path, member.worker, fleet_.PollOf(member.worker)->incarnation});
  }
  StatusOr<std::vector<v1::Lease>> leases = core_->GrantGang(members[0].job, granted, first == nullptr ? "" : first->address(), port,
                                                             turn.now, &turn.events);
  if (!leases.ok()) return;  // the result of one came out of the cache meanwhile
  for (size_t m = 0; m < members.size(); ++m) {
    Poll* poll = fleet_.PollOf(members[m].worker);
    *poll->response->add_grants() = std::move((*leases)[m]);
    --poll->free_slots;
  }
}

void Coordinator::WriteReports(Turn& turn) {
  for (const std::string& job : core_->JobsWithoutReport()) {
    ReportRetry& retry = report_retries_[job];
    if (retry.not_before > turn.now.steady) continue;
    const Status status = WriteReport(turn, job);
    if (status.ok()) {
      report_retries_.erase(job);
      continue;
    }
    spdlog::error("report job={} failed: {}", job, Message(status));
    retry.not_before = turn.now.steady + kReportRetry;
    if (++retry.failures < kMaxReportFailures) continue;
    core_->Fail(job, Join("the report could not be written: ", Message(status)), turn.now, &turn.events);
    report_retries_.erase(job);
  }
}

Status Coordinator::WriteReport(Turn& turn, const std::string& id) try {
  const jobs::JobState& job = core_->state().jobs.at(id);
  report::ReportInput input{.job = jobs::ToProto(job, true, turn.now), .notes = job.notes};
  for (size_t i = 0; i < job.tasks.size(); ++i) {
    const plan::PlannedTask& planned = job.plan.tasks[i];
    const std::string& output = job.tasks[i].output.digest();
    if (output.empty() || (planned.kind != v1::TRAIN && planned.kind != v1::CURATE)) continue;
    const bool is_training = planned.kind == v1::TRAIN;
    StatusOr<std::string> text = store::ReadArtifactFile(*blobs_, output, is_training ? "curve.jsonl" : "summary.json");
    if (!text.ok()) {  // the report can say less; the job has its artifact all the same
      spdlog::warn("report job={} path={} without: {}", id, planned.path, Message(text.status()));
      continue;
    }
    (is_training ? input.curves[planned.path] : input.curate_summary) = *std::move(text);
  }
  const report::Report report = options_.make_report(input);
  RF_ASSIGN_OR_RETURN(const v1::ArtifactRef ref, store::PutArtifact(*blobs_, "report",
                                                                    {{"report.md", report.markdown},
                                                                     {"report.html", report.html},
                                                                     {"table.txt", report.table}}));
  return core_->WriteReport(id, ref, turn.now, &turn.events);
} catch (const std::exception& e) {  // JSON that is not what it should be
  return Internal("making it failed: ", e.what());
}

Status Coordinator::Commit(Turn& turn) {
  if (turn.events.empty() && turn.owners.empty()) return absl::OkStatus();
  const auto start = std::chrono::steady_clock::now();
  const Status status = log_->Append(turn.events, turn.owners);
  if (absl::IsResourceExhausted(status)) {
    TakeBack(status, !turn.events.empty());
    return WithRetryAfter(WithReason(status, "DISK_FULL"), std::chrono::seconds(1));
  }
  if (!status.ok()) {
    spdlog::critical("stopping, because events could not be made durable: {}", Message(status));
    std::_Exit(1);
  }
  access_.Add(turn.owners);
  metrics_.OnCommit(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  committed_events_ += turn.events.size();
  if (options_.exit_after_event != 0 && committed_events_ >= options_.exit_after_event) _exit(137);
  store::Failpoint("reply_before");
  return absl::OkStatus();
}

// After the answers: nobody waits for a line or a number.
void Coordinator::Record(const jobs::Events& events) {
  for (const v1::Event& event : events) {
    const std::string path = PathOf(event);
    v1::TaskKind kind = v1::TASK_KIND_UNSPECIFIED;
    if (!path.empty()) {
      const jobs::JobState& job = core_->state().jobs.at(event.job());
      kind = job.plan.tasks[job.index.at(path)].kind;
    }
    metrics_.OnEvent(event, kind);
    if (!spdlog::should_log(spdlog::level::info)) continue;
    spdlog::info("event={} seq={} job={} path={} {}", KindOf(event), event.seq(), event.job(), path, DetailOf(event));
  }
}

void Coordinator::UpdateMetrics(const jobs::Now& now) {
  metrics_updated_ = now.steady;
  metrics::Snapshot snapshot;
  std::array<std::array<uint64_t, v1::Task::State_ARRAYSIZE>, v1::TaskKind_ARRAYSIZE> tasks{};  // there may be 100,000
  for (const auto& [id, job] : core_->state().jobs) {
    ++snapshot.jobs[job.state];
    if (jobs::IsTerminal(job.state)) continue;
    for (size_t i = 0; i < job.tasks.size(); ++i) ++tasks[job.plan.tasks[i].kind][job.tasks[i].state];
  }
  for (int kind = 0; kind < v1::TaskKind_ARRAYSIZE; ++kind) {
    for (int state = 0; state < v1::Task::State_ARRAYSIZE; ++state) {
      if (tasks[kind][state] == 0) continue;
      snapshot.tasks[{static_cast<v1::TaskKind>(kind), static_cast<v1::Task::State>(state)}] = tasks[kind][state];
    }
  }
  for (const v1::WorkerInfo& worker : fleet_.List(now.steady)) ++snapshot.workers[worker.state()];
  snapshot.heartbeat_age_seconds = std::chrono::duration<double>(fleet_.HeartbeatAge(now.steady)).count();
  snapshot.cas_bytes = blobs_->total_bytes();
  snapshot.cas_blobs = blobs_->total_blobs();
  snapshot.stale_commits = core_->stale_commits();
  metrics_.Update(snapshot);
  fleet_.Forget(now.steady);
}

}  // namespace refinery::api
