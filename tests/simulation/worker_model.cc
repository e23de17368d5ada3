#include "tests/simulation/worker_model.h"

#include <algorithm>
#include <cstdio>

#include "common/digest.h"
#include "common/limits.h"
#include "tests/simulation/fake_work.h"

namespace refinery::simulation {
namespace {

constexpr Time kBusyDeadline = 5'000;
constexpr Time kCallDeadline = 30'000;
constexpr Time kPollSlack = 10'000;
constexpr Time kFirstBackoff = 200;
constexpr Time kLongestBackoff = 1'000;
constexpr int kStepsPerCheckpoint = 2;

std::string KeyOf(const v1::LeaseToken& token) { return Join(token.job(), "/", token.path(), "#", token.epoch()); }

v1::FailureClass RandomClass(Random& random) {
  const double which = random.Uniform();
  return which < 0.6 ? v1::INFRA : which < 0.8 ? v1::NODE : which < 0.97 ? v1::RESOURCE : v1::USER;
}

}  // namespace

WorkerModel::WorkerModel(World* world, int index, uint32_t slots)
    : world_(world), id_(Join("w", index < 10 ? "000" : index < 100 ? "00" : index < 1000 ? "0" : "", index)), slots_(slots) {}

void WorkerModel::Later(Time delay, std::function<void()> action) {
  world_->queue.After(delay, [this, life = life_, action = std::move(action)] {
    if (life != life_ || !up_) return;
    if (paused_) {
      deferred_.push_back(action);
    } else {
      action();
    }
  });
}

void WorkerModel::Say(const std::string& what) const {
  if (world_->options.verbose) std::fprintf(stderr, "%lld ms: %s %s\n", static_cast<long long>(world_->queue.now()), id_.c_str(), what.c_str());
}

void WorkerModel::Start() {
  if (up_) return;
  up_ = true;
  ++life_;
  backoff_ = kFirstBackoff;
  heard_ = renewed_ = world_->queue.now();
  Later(world_->network.Between(0, 1'000), [this] { Synchronize(); });
}

void WorkerModel::Crash() {
  if (!up_) return;
  SetPaused(false);
  while (!attempts_.empty()) Drop(attempts_.begin()->first);
  up_ = false;
  ++life_;
  ++sync_call_;  // an answer that is still on its way is for nobody
  deferred_.clear();
}

void WorkerModel::SetPaused(bool paused) {
  if (!up_ || paused == paused_) return;
  paused_ = paused;
  if (paused) return world_->auditor.OnSuspended(id_, true);
  // The first thing that happens is the clock: what the lease no longer covers ends before it does anything else.
  Fence();
  world_->auditor.OnSuspended(id_, false);
  std::vector<std::function<void()>> deferred;
  deferred.swap(deferred_);
  for (auto& action : deferred) Later(0, std::move(action));
}

void WorkerModel::Synchronize() {
  Fence();
  auto request = std::make_shared<v1::SynchronizeRequest>();
  request->mutable_worker()->set_id(id_);
  request->set_incarnation(Join(id_, "-", life_));
  for (const auto& [key, attempt] : attempts_) {
    v1::RunningAttempt* running = request->add_running();
    *running->mutable_lease() = attempt.lease.token();
    *running->mutable_progress() = attempt.progress;
  }
  const bool idle = attempts_.empty();
  request->set_free_slots(slots_ - std::min<uint32_t>(slots_, static_cast<uint32_t>(attempts_.size())));
  const int call = ++sync_call_;
  request->set_revision(static_cast<uint64_t>(call));
  const Time sent = world_->queue.now();
  request->set_unheard_ms(static_cast<uint32_t>(sent - heard_));
  const auto fail = [this, call] {
    if (call != sync_call_) return;
    Fence();
    ++sync_call_;
    Later(backoff_, [this] { Synchronize(); });
    backoff_ = std::min(backoff_ * 2, kLongestBackoff);
  };
  const Time to_fence = std::clamp<Time>(FenceTime() - sent, kFirstBackoff, kBusyDeadline);
  Later(idle ? world_->scenario.coordinator.long_poll + kPollSlack : to_fence, fail);
  world_->Send(id_, true, [this, request, call, sent, fail] {
    const bool heard = world_->coordinator->Deliver([this, request, call, sent](CoordinatorModel::Turn& turn) {
      world_->coordinator->Synchronize(*request, [this, call, sent](const v1::SynchronizeResponse& response) {
        world_->Send(id_, false, [this, call, sent, response] {
          Later(0, [this, call, sent, response] {
            if (call == sync_call_) OnSynchronized(sent, response);
          });
        });
      }, turn);
    });
    if (!heard) Later(1, fail);
  });
}

void WorkerModel::OnSynchronized(Time sent, const v1::SynchronizeResponse& response) {
  ++sync_call_;
  Say(Join("has an answer to what it sent at ", sent));
  heard_ = world_->queue.now();
  if (!response.not_renewed()) renewed_ = sent;
  backoff_ = kFirstBackoff;
  for (const v1::LeaseToken& token : response.cancel()) Drop(KeyOf(token));
  for (const v1::Lease& lease : response.grants()) {
    if (world_->queue.now() < FenceTime() || world_->options.mutations.no_fence) Begin(lease);
  }
  Fence();
  if (attempts_.size() > slots_) world_->auditor.Fail(Join("worker ", id_, " runs ", attempts_.size(), " attempts in ", slots_, " slots"));
  const bool at_once = response.grants_size() > 0 || response.not_renewed() || attempts_.empty();
  Later(at_once ? 1 : response.next_synchronize_ms(), [this] { Synchronize(); });
}

Time WorkerModel::FenceTime() const {
  const Time ttl = world_->scenario.coordinator.lease_ttl.count();
  return renewed_ + ttl - limits::FenceMargin(std::chrono::milliseconds(ttl)).count();
}

void WorkerModel::Fence() {
  if (world_->options.mutations.no_fence || world_->queue.now() < FenceTime()) return;
  std::vector<std::string> over, finished;
  for (const auto& [key, attempt] : attempts_) {
    if (attempt.ended) continue;  // it may still be reported: the coordinator decides
    (attempt.steps + 1 >= attempt.total && attempt.hangs_at < 0 ? finished : over).push_back(key);
  }
  for (const std::string& key : over) Drop(key);
  for (const std::string& key : finished) Finish(key);  // its task ended just before
}

void WorkerModel::Drop(const std::string& key) {
  const auto found = attempts_.find(key);
  if (found == attempts_.end()) return;
  Say(Join("drops ", key));
  if (!found->second.ended) world_->auditor.OnStopped(found->second.lease.token(), id_);
  attempts_.erase(found);
}

// What the attempt would fail to download.
std::string WorkerModel::MissingOf(const v1::Lease& lease) const {
  for (const v1::ArtifactRef& input : lease.spec().inputs()) {
    if (!world_->auditor.HasBlob(input.digest())) return Join("input '", input.name(), "'");
  }
  const std::string& checkpoint = lease.checkpoint().digest();
  return checkpoint.empty() || world_->auditor.HasBlob(checkpoint) ? "" : "the checkpoint";
}

void WorkerModel::Begin(const v1::Lease& lease) {
  const std::string key = KeyOf(lease.token());
  if (attempts_.contains(key)) return;
  Random random(DeriveSeed(world_->options.seed, key));
  Attempt attempt;
  attempt.lease = lease;
  attempt.total = static_cast<int>(random.Between(2, 6));
  attempt.step = random.Between(world_->scenario.step_low, world_->scenario.step_high);
  *attempt.end.mutable_lease() = lease.token();
  std::string missing = MissingOf(lease);
  if (!missing.empty() && (world_->scenario.faults & kBlobLoss) == 0) {
    world_->auditor.Fail(Join(key, " was leased with an input that is not stored: ", missing));
  }
  if (!missing.empty()) {
    attempt.total = 1;
    attempt.end.mutable_error()->set_failure_class(v1::INFRA);
    attempt.end.mutable_error()->set_code(static_cast<int>(absl::StatusCode::kNotFound));
    attempt.end.mutable_error()->set_message(Join(missing, " is not in the store"));
  } else if (world_->Is(kTaskFailure) && random.Chance(world_->scenario.task_failure)) {
    attempt.end.mutable_error()->set_failure_class(RandomClass(random));
    attempt.end.mutable_error()->set_message("it broke");
  } else {
    SetOutcome(lease.spec(), &attempt.end);
    if (attempt.end.has_success()) attempt.end.mutable_success()->set_seconds(static_cast<double>(attempt.step * attempt.total) / 1e3);
  }
  if (missing.empty() && world_->Is(kTaskHang) && random.Chance(world_->scenario.task_hang)) {
    attempt.hangs_at = static_cast<int>(random.Between(1, attempt.total - 1));
  }
  Say(Join("begins ", key));
  attempt.progress.set_phase("working");
  attempt.progress.set_total(attempt.total);
  attempt.steps = static_cast<int>(std::min<uint64_t>(lease.checkpoint_step() % 100, static_cast<uint64_t>(attempt.total - 1)));
  const Time step = attempt.step;
  world_->auditor.OnRunning(lease.token(), id_);
  attempts_.emplace(key, std::move(attempt));
  Later(step, [this, key] { Step(key); });
}

void WorkerModel::Step(const std::string& key) {
  const auto found = attempts_.find(key);
  if (found == attempts_.end()) return;
  Fence();
  if (!attempts_.contains(key)) return;
  Attempt& attempt = found->second;
  if (attempt.hangs_at == attempt.steps) return;
  attempt.progress.set_done(++attempt.steps);
  if (attempt.steps >= attempt.total) return Finish(key);
  if (attempt.lease.spec().has_train() && attempt.steps % kStepsPerCheckpoint == 0) {
    const uint64_t step = attempt.lease.checkpoint_step() + static_cast<uint64_t>(attempt.steps);
    Later(20, [this, key, step] { CommitCheckpoint(key, step); });
  }
  Later(attempt.step, [this, key] { Step(key); });
}

void WorkerModel::CommitCheckpoint(const std::string& key, uint64_t step) {
  const auto found = attempts_.find(key);
  if (found == attempts_.end()) return;
  auto request = std::make_shared<v1::CommitCheckpointRequest>();
  *request->mutable_lease() = found->second.lease.token();
  request->set_step(step);
  request->mutable_checkpoint()->set_digest(DigestOf(Join(key, " step ", step)));
  if (!world_->options.mutations.commit_before_blob) world_->auditor.OnUploaded(request->checkpoint().digest());
  world_->Send(id_, true, [this, request] {
    (void)world_->coordinator->Deliver([this, request](CoordinatorModel::Turn& turn) {
      const bool stale = world_->auditor.IsStale(request->lease(), false);
      const bool accepted = turn.core.CommitCheckpoint(*request, turn.now, &turn.events).ok();
      world_->auditor.OnCommitAnswered(request->lease(), stale, accepted);
    });
  });
}

void WorkerModel::Finish(const std::string& key) {
  Attempt& attempt = attempts_.at(key);
  attempt.ended = true;
  Say(Join("has done ", key));
  world_->auditor.OnStopped(attempt.lease.token(), id_);
  if (attempt.end.has_success()) {
    world_->auditor.OnMade(attempt.lease.token(), attempt.end.success().output().digest());
    if (!world_->options.mutations.commit_before_blob) world_->auditor.OnUploaded(attempt.end.success().output().digest());
  }
  Later(world_->network.Between(1, 200), [this, key] { Report(key); });
}

void WorkerModel::Report(const std::string& key) {
  const auto found = attempts_.find(key);
  if (found == attempts_.end()) return;
  auto request = std::make_shared<v1::CompleteTaskRequest>(found->second.end);
  const int call = ++found->second.call;
  const auto again = [this, key, call] {
    const auto attempt = attempts_.find(key);
    if (attempt == attempts_.end() || attempt->second.call != call) return;
    ++attempt->second.call;
    Later(500, [this, key] { Report(key); });
  };
  Later(kCallDeadline, again);
  world_->Send(id_, true, [this, request, key, call, again] {
    const bool heard = world_->coordinator->Deliver([this, request, key, call](CoordinatorModel::Turn& turn) {
      const bool stale = world_->auditor.IsStale(request->lease(), true);
      const std::string& output = request->success().output().digest();
      Status status = absl::OkStatus();
      if (!stale && request->has_success() && !world_->options.mutations.commit_before_blob && !world_->auditor.HasBlob(output)) {
        world_->auditor.OnUploadedAgain(output);  // lost meanwhile: the worker sends it again
      }
      status = turn.core.Complete(*request, turn.now, &turn.events);
      world_->auditor.OnCommitAnswered(request->lease(), stale, status.ok());
      turn.replies.push_back([this, key, call] {
        world_->Send(id_, false, [this, key, call] {
          Later(0, [this, key, call] {
            const auto attempt = attempts_.find(key);
            if (attempt != attempts_.end() && attempt->second.call == call) Drop(key);  // taken or refused: it is over
          });
        });
      });
    });
    if (!heard) Later(1, again);
  });
}

}  // namespace refinery::simulation
