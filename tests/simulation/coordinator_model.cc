#include "tests/simulation/coordinator_model.h"

#include <algorithm>
#include <cstdio>
#include <utility>

#include "common/digest.h"

namespace refinery::simulation {
namespace {

constexpr int64_t kUnixStart = 1'700'000'000'000;
constexpr Time kRestart = 500;  // from a fatal error to the next start

// Without what is long and says little.
std::string Brief(v1::Event event) {
  if (event.has_task_leased()) event.mutable_task_leased()->clear_spec();
  if (event.has_job_created()) event.mutable_job_created()->Clear();
  return event.ShortDebugString();
}

}  // namespace

CoordinatorModel::CoordinatorModel(const CoordinatorSettings& settings, uint64_t seed, EventQueue* queue, Auditor* auditor,
                                   Result* result)
    : settings_(settings), queue_(queue), auditor_(auditor), result_(result), disk_random_(seed, "disk") {}

jobs::CoreOptions CoordinatorModel::MakeCoreOptions() const {
  jobs::CoreOptions options;
  options.lease_ttl = settings_.lease_ttl;
  options.pause_grace = std::chrono::milliseconds(20'000);
  options.stall_timeout = std::chrono::milliseconds(120'000);
  options.code_version = "simulation";
  options.is_complete = [auditor = auditor_](const std::string& digest) { return auditor->HasBlob(digest); };
  options.mutations = settings_.mutations.core;
  return options;
}

jobs::Now CoordinatorModel::Clocks() const {
  return {.steady = std::chrono::milliseconds(queue_->now() + steady_offset_),
          .unix_ms = kUnixStart + queue_->now() + unix_jump_};
}

void CoordinatorModel::Start() {
  if (core_ != nullptr) return;
  ++life_;
  ++result_->restarts;
  paused_ = committing_ = false;
  turn_at_ = -1;
  steady_offset_ = disk_random_.Between(0, 1'000'000'000);
  auto core = std::make_unique<jobs::Core>(MakeCoreOptions());
  if (!snapshot_.empty()) {
    const Status restored = core->Restore(snapshot_);
    if (!restored.ok()) return auditor_->Fail(Join("the snapshot was refused: ", Message(restored)));
  }
  const StatusOr<jobs::Events> events = log_.Recover();
  if (!events.ok()) return auditor_->Fail(Message(events.status()));
  for (const v1::Event& event : *events) {
    const Status status = core->Replay(event);
    if (!status.ok()) return auditor_->Fail(Join("the log was refused: ", Message(status)));
  }
  auditor_->OnRecovered(*events, snapshot_seq_, core->state().last_seq);
  core_ = std::move(core);
  inbox_.push_back([](Turn& turn) { turn.core.StartGrace(turn.now, &turn.events); });
  ScheduleTurn(0);
}

void CoordinatorModel::Later(Time delay, std::function<void()> action) {
  queue_->After(delay, [this, life = life_, action = std::move(action)] {
    if (life != life_ || core_ == nullptr) return;
    if (paused_) {
      deferred_.push_back(action);
    } else {
      action();
    }
  });
}

void CoordinatorModel::Crash(Time downtime) {
  if (core_ == nullptr) return;
  if (settings_.compare && !committing_) Compare();
  core_.reset();
  ++life_;
  inbox_.clear();
  polls_.clear();
  workers_.clear();
  seen_.clear();
  deferred_.clear();
  committing_ = paused_ = false;
  crash_point_ = CrashPoint::kNone;
  log_.Crash(disk_random_);
  queue_->After(downtime, [this] { Start(); });
}

void CoordinatorModel::Compare() {
  if (core_ == nullptr || committing_) return;
  jobs::Core replayed(MakeCoreOptions());
  if (!snapshot_.empty() && !replayed.Restore(snapshot_).ok()) return auditor_->Fail("the snapshot was refused");
  const StatusOr<jobs::Events> events = log_.Recover();
  if (!events.ok()) return auditor_->Fail(Message(events.status()));
  for (const v1::Event& event : *events) {
    const Status status = replayed.Replay(event);
    if (!status.ok()) return auditor_->Fail(Join("the log was refused: ", Message(status)));
  }
  const std::string live = jobs::Dump(core_->state());
  if (jobs::Dump(replayed.state()) != live) return auditor_->Fail("replaying the log gives another state than the live one");
  if (replayed.Snapshot() != core_->Snapshot()) return auditor_->Fail("equal states give different snapshots");
  jobs::Core restored(MakeCoreOptions());
  const Status status = restored.Restore(core_->Snapshot());
  if (!status.ok()) return auditor_->Fail(Join("a snapshot was refused: ", Message(status)));
  if (jobs::Dump(restored.state()) != live) return auditor_->Fail("a snapshot gives another state than the one it was taken of");
}

void CoordinatorModel::set_paused(bool paused) {
  if (core_ == nullptr) return;
  paused_ = paused;
  if (paused) return;
  std::vector<std::function<void()>> deferred;
  deferred.swap(deferred_);
  for (const auto& action : deferred) queue_->After(0, [this, life = life_, action] { if (life == life_ && !paused_) action(); });
}

void CoordinatorModel::set_disk(bool full, Time extra_fsync) {
  disk_full_ = full;
  log_.set_full(full);
  extra_fsync_ = extra_fsync;
}

bool CoordinatorModel::Deliver(Command command) {
  if (core_ == nullptr) return false;
  inbox_.push_back(std::move(command));
  ScheduleTurn(std::max<Time>(0, last_turn_ + settings_.least_turn - queue_->now()));
  return true;
}

void CoordinatorModel::ScheduleTurn(Time delay) {
  const Time at = queue_->now() + delay;
  if (turn_at_ >= 0 && turn_at_ <= at) return;
  turn_at_ = at;
  Later(delay, [this, at] {
    if (committing_ || turn_at_ != at) return;
    turn_at_ = -1;
    RunTurn();
  });
}

void CoordinatorModel::RunTurn() {
  last_turn_ = queue_->now();
  Turn turn{.core = *core_, .now = Clocks()};
  std::vector<Command> commands;
  commands.swap(inbox_);
  for (const Command& command : commands) command(turn);
  core_->Tick(turn.now, &turn.events);
  if (settings_.upkeep_every > 0 && queue_->now() - last_upkeep_ >= settings_.upkeep_every) {
    last_upkeep_ = queue_->now();
    core_->OnLost(auditor_->LostBlobs(), turn.now, &turn.events);
  }
  for (const std::string& job : core_->JobsWithoutReport()) {
    v1::ArtifactRef report;
    report.set_digest(DigestOf("report of " + job));
    auditor_->OnUploaded(report.digest());
    const Status status = core_->WriteReport(job, report, turn.now, &turn.events);
    if (!status.ok()) auditor_->Fail(Message(status));
  }
  Grant(turn);
  AnswerPolls(turn);
  for (const v1::Event& event : turn.events) {
    if (settings_.verbose) std::fprintf(stderr, "%lld ms: %s\n", static_cast<long long>(queue_->now()), Brief(event).c_str());
  }
  auditor_->OnEvents(turn.events);
  Commit(std::move(turn));
}

void CoordinatorModel::Synchronize(const v1::SynchronizeRequest& request, PollReply reply, Turn& turn) {
  const std::string& worker = request.worker().id();
  jobs::Core::Report report = turn.core.Synchronize(request, turn.now, &turn.events);
  workers_[worker] = request.worker();
  seen_[worker] = queue_->now();
  Poll& poll = polls_[worker];
  if (poll.reply) turn.replies.push_back([old = std::move(poll.reply), response = std::move(poll.response)] { old(response); });
  poll = Poll{.incarnation = request.incarnation(),
              .free_slots = report.not_renewed ? 0 : request.free_slots(),
              .deadline = queue_->now() + (request.running().empty() ? settings_.long_poll : 0),
              .reply = std::move(reply)};
  poll.response.mutable_cancel()->Swap(&report.cancel);
  poll.response.set_not_renewed(report.not_renewed);
  poll.response.set_lease_ttl_ms(static_cast<uint32_t>(settings_.lease_ttl.count()));
  poll.response.set_next_synchronize_ms(static_cast<uint32_t>(settings_.synchronize));
}

void CoordinatorModel::Grant(Turn& turn) {
  if (core_->state().queues.empty()) return;
  std::vector<scheduler::Worker> workers;
  for (const auto& [id, info] : workers_) {
    const auto poll = polls_.find(id);
    if (poll == polls_.end() && queue_->now() - seen_[id] > settings_.lease_ttl.count()) continue;
    workers.push_back({.id = id, .free_slots = poll == polls_.end() ? 0 : poll->second.free_slots, .info = &info});
  }
  const scheduler::Pass pass = scheduler::Schedule(*core_, workers, turn.now, {.gang_patience = std::chrono::milliseconds(60'000)});
  for (const scheduler::Decision& decision : pass.grants) {
    Poll& poll = polls_.at(decision.worker);
    StatusOr<v1::Lease> lease =
        core_->Grant(decision.job, decision.path, decision.worker, poll.incarnation, turn.now, &turn.events);
    if (!lease.ok()) continue;
    *poll.response.add_grants() = *std::move(lease);
    if (poll.free_slots == 0) auditor_->Fail(Join("worker ", decision.worker, " was granted more than it has room for"));
    --poll.free_slots;
    ++result_->attempts;
  }
  for (const scheduler::Decision& decision : pass.preemptions) core_->Preempt(decision.job, decision.path, "preempted");
}

void CoordinatorModel::AnswerPolls(Turn& turn) {
  for (auto it = polls_.begin(); it != polls_.end();) {
    Poll& poll = it->second;
    if (poll.deadline > queue_->now() && poll.response.grants().empty() && poll.response.cancel().empty()) {
      ++it;
      continue;
    }
    turn.replies.push_back([reply = std::move(poll.reply), response = std::move(poll.response)] { reply(response); });
    it = polls_.erase(it);
  }
}

void CoordinatorModel::Commit(Turn turn) {
  result_->events += turn.events.size();
  const uint64_t seq = core_->state().last_seq;
  const bool early = settings_.mutations.reply_before_append;
  if (early) {
    auditor_->OnAcknowledged(seq);
    for (const auto& reply : turn.replies) reply();
  }
  if (turn.events.empty()) return EndCommit(early ? std::vector<std::function<void()>>() : turn.replies, seq);
  committing_ = true;
  const CrashPoint point = std::exchange(crash_point_, CrashPoint::kNone);
  if (point == CrashPoint::kBeforeWrite) return Crash(downtime_);
  const Status written = log_.Write(turn.events);
  if (!written.ok()) return Crash(kRestart);  // the process ends: its memory is ahead of its log
  if (point == CrashPoint::kInWrite) return Crash(downtime_);
  const Time fsync = disk_random_.Between(settings_.fsync_low, settings_.fsync_high) + extra_fsync_;
  Later(fsync, [this, early, seq, point, replies = std::move(turn.replies)] {
    log_.Sync();
    if (point == CrashPoint::kBeforeReplies) return Crash(downtime_);
    if (point == CrashPoint::kAmongReplies) {
      for (size_t i = 0; i < replies.size() / 2 && !early; ++i) replies[i]();
      if (replies.size() >= 2) auditor_->OnAcknowledged(seq);
      return Crash(downtime_);
    }
    committing_ = false;
    EndCommit(early ? std::vector<std::function<void()>>() : replies, seq);
  });
}

void CoordinatorModel::EndCommit(const std::vector<std::function<void()>>& replies, uint64_t seq) {
  if (!replies.empty()) auditor_->OnAcknowledged(seq);
  for (const auto& reply : replies) reply();
  MaybeCompact();
  const bool waiting = !inbox_.empty();
  turn_at_ = -1;
  ScheduleTurn(waiting ? std::max<Time>(0, last_turn_ + settings_.least_turn - queue_->now()) : settings_.tick);
}

void CoordinatorModel::MaybeCompact() {
  const uint64_t seq = core_->state().last_seq;
  if (settings_.compact_every == 0 || seq < snapshot_seq_ + settings_.compact_every) return;
  snapshot_ = core_->Snapshot();
  snapshot_seq_ = seq;
  log_.Compact();
  auditor_->OnCompacted(seq);
}

}  // namespace refinery::simulation
