#include "tests/simulation/world.h"

#include <algorithm>
#include <cstdio>
#include <map>

#include "common/digest.h"
#include "tests/simulation/fake_work.h"
#include "tests/simulation/worker_model.h"

namespace refinery::simulation {
namespace {

constexpr Time kMinute = 60'000;
constexpr Time kUserRetry = 2'000;
constexpr int kUserTries = 1'000'000;

}  // namespace

World::World(const SimulationOptions& run_options)
    : options(run_options),
      auditor(&result),
      network(run_options.seed, "network"),
      plan_random_(run_options.seed, "plan") {
  if (options.hours > 0) {
    PlanLong();
  } else {
    Plan();
  }
  scenario.coordinator.mutations = options.mutations;
  scenario.coordinator.verbose = options.verbose;
  result.planned_faults = static_cast<int>(planned_.size());
  result.used_jobs = scenario.jobs;
  result.used_workers = scenario.workers;
  result.used_faults = scenario.faults;
  auditor.OnUploaded(DigestOf("seeds"));
  coordinator = std::make_unique<CoordinatorModel>(scenario.coordinator, options.seed, &queue, &auditor, &result);
  for (int i = 0; i < scenario.workers; ++i) workers.push_back(std::make_unique<WorkerModel>(this, i, scenario.slots));
}

World::~World() = default;

// Swarm testing: each seed has a few kinds of faults at rates of its own, so that rare combinations come up.
void World::Plan() {
  Random& random = plan_random_;
  scenario.jobs = static_cast<int>(random.Between(1, 3));
  scenario.workers = static_cast<int>(random.Between(1, 5));
  scenario.slots = static_cast<uint32_t>(random.Between(1, 2));
  scenario.fault_end = random.Between(3, 10) * kMinute;
  scenario.step_high = random.Chance(0.5) ? 8'000 : 20'000;
  scenario.coordinator.compact_every = random.Chance(0.3) ? static_cast<uint64_t>(random.Between(5, 60)) : 0;
  for (uint32_t kind = 1; kind < kAllFaults; kind <<= 1) {
    if (random.Chance(0.45)) scenario.faults |= kind;
  }
  scenario.loss = random.Uniform() * 0.25;
  scenario.duplication = random.Uniform() * 0.25;
  scenario.delay = random.Uniform() * 0.1;
  scenario.task_failure = random.Uniform() * 0.2;
  scenario.task_hang = random.Uniform() * 0.1;
  const int64_t count = random.Between(2, 30);
  constexpr FaultKind kKinds[] = {kCoordinatorCrash, kCoordinatorPause, kWorkerCrash, kWorkerPause, kPartition,
                                  kClockJump,        kSlowDisk,         kFullDisk,    kUserAction,  kBlobLoss};
  for (int64_t i = 0; i < count; ++i) {
    PlannedFault fault;
    fault.kind = kKinds[random.Next() % std::size(kKinds)];
    fault.time = random.Between(0, scenario.fault_end);
    fault.target = static_cast<int>(random.Between(0, 1'000));
    fault.variant = static_cast<int>(random.Between(0, 1'000));
    // Often around the life of a lease, on both sides of it.
    fault.duration = random.Chance(0.5) ? random.Between(100, 5'000) : random.Between(15'000, 90'000);
    planned_.push_back(fault);
  }
  scenario.faults &= options.faults;
  scenario.coordinator.upkeep_every = options.seed % 3 == 0 ? 30'000 : 0;
  if (options.jobs > 0) scenario.jobs = options.jobs;
  if (options.workers > 0) scenario.workers = options.workers;
  scenario.limit = scenario.fault_end + 12 * 60 * kMinute;
}

// A fleet over a day: each worker has its share of faults an hour.
void World::PlanLong() {
  Random& random = plan_random_;
  scenario.workers = options.workers > 0 ? options.workers : 1'000;
  const double busy = options.hours * scenario.workers;  // worker hours
  scenario.step_low = 30'000;
  scenario.step_high = 180'000;
  scenario.jobs = options.jobs > 0 ? options.jobs : std::max(1, static_cast<int>(busy * 7.5 / (2 * options.shards + 40)));
  scenario.faults = kAllFaults & ~(kUserAction | kBlobLoss) & options.faults;
  scenario.fault_end = static_cast<Time>(options.hours * 60 * kMinute);
  scenario.loss = scenario.duplication = scenario.delay = 0.0005;
  scenario.task_failure = 0.001;
  scenario.task_hang = 0.0005;
  scenario.coordinator.synchronize = 4'000;
  scenario.coordinator.long_poll = 50'000;
  scenario.coordinator.tick = 1'000;
  scenario.coordinator.least_turn = 200;
  scenario.coordinator.compact_every = 100'000;
  scenario.coordinator.compare = false;
  const auto add = [&](FaultKind kind, double count, Time low, Time high) {
    for (int i = 0; i < static_cast<int>(count + 0.5); ++i) {
      planned_.push_back({.time = random.Between(0, scenario.fault_end),
                          .kind = kind,
                          .target = static_cast<int>(random.Between(0, scenario.workers - 1)),
                          .variant = static_cast<int>(random.Between(0, 1'000)),
                          .duration = random.Between(low, high)});
    }
  };
  const double faults = busy * options.faults_per_hour;
  add(kWorkerCrash, faults * 0.5, 5'000, 600'000);
  add(kWorkerPause, faults * 0.25, 1'000, 120'000);
  add(kPartition, faults * 0.25, 1'000, 300'000);
  add(kCoordinatorCrash, options.hours * 0.5, 500, 60'000);
  add(kCoordinatorPause, options.hours * 0.25, 1'000, 60'000);
  add(kSlowDisk, options.hours * 0.25, 1'000, 60'000);
  add(kFullDisk, options.hours * 0.1, 1'000, 60'000);
  add(kClockJump, options.hours * 0.25, 1'000, 1'000);
  scenario.limit = scenario.fault_end + 48 * 60 * kMinute;
}

void World::Send(const std::string& worker, bool to_coordinator, const std::function<void()>& action) {
  const auto cut = cuts_.find(worker);
  if (cut != cuts_.end() && (to_coordinator ? cut->second.to : cut->second.from) > 0) return;
  if (Is(kMessageLoss) && network.Chance(scenario.loss)) return;
  const auto latency = [&] {
    return network.Between(1, 5) + (Is(kMessageDelay) && network.Chance(scenario.delay) ? network.Between(50, 50'000) : 0);
  };
  queue.After(latency(), action);
  if (Is(kMessageDuplication) && network.Chance(scenario.duplication)) queue.After(latency(), action);
}

void World::StartFault(const PlannedFault& fault) {
  if ((scenario.faults & fault.kind) == 0) return;
  ++result.faults;
  WorkerModel& worker = *workers[static_cast<size_t>(fault.target) % workers.size()];
  if (options.verbose) {
    std::fprintf(stderr, "%lld ms: %s target %d variant %d for %lld ms\n", static_cast<long long>(queue.now()),
                 FaultName(fault.kind).c_str(), fault.target, fault.variant, static_cast<long long>(fault.duration));
  }
  using Point = CoordinatorModel::CrashPoint;
  constexpr Point kPoints[] = {Point::kNone, Point::kBeforeWrite, Point::kInWrite, Point::kBeforeReplies, Point::kAmongReplies};
  switch (fault.kind) {
    case kCoordinatorCrash: {
      const Point point = kPoints[fault.variant % std::size(kPoints)];
      if (point == Point::kNone) {
        coordinator->Crash(fault.duration);
      } else {
        coordinator->CrashAt(point, fault.duration);
      }
      return;
    }
    case kCoordinatorPause: coordinator->set_paused(true); break;
    case kWorkerCrash: worker.Crash(); break;
    case kWorkerPause: worker.SetPaused(true); break;
    case kPartition:
      cuts_[worker.id()].to += fault.variant % 3 != 1;
      cuts_[worker.id()].from += fault.variant % 3 != 2;
      break;
    case kClockJump: coordinator->JumpClock((fault.variant % 2 == 0 ? 1 : -1) * fault.duration * 100); return;
    case kSlowDisk: coordinator->set_disk(full_disk_, fault.duration / 4); break;
    case kFullDisk: coordinator->set_disk(full_disk_ = true, 0); break;
    case kUserAction: UserAction(fault.target, fault.variant); return;
    case kBlobLoss: auditor.LoseBlob(static_cast<size_t>(fault.target)); return;
    default: return;
  }
  queue.After(fault.duration, [this, fault] { EndFault(fault); });
}

void World::EndFault(const PlannedFault& fault) {
  WorkerModel& worker = *workers[static_cast<size_t>(fault.target) % workers.size()];
  switch (fault.kind) {
    case kCoordinatorPause: return coordinator->set_paused(false);
    case kWorkerCrash: return worker.Start();
    case kWorkerPause: return worker.SetPaused(false);
    case kPartition:
      cuts_[worker.id()].to -= fault.variant % 3 != 1;
      cuts_[worker.id()].from -= fault.variant % 3 != 2;
      return;
    case kSlowDisk: return coordinator->set_disk(full_disk_, 0);
    case kFullDisk: return coordinator->set_disk(full_disk_ = false, 0);
    default: return;
  }
}

// A user's call, repeated until it is answered. What is answered is checked against the log at every restart.
void World::Call(const std::string& what, std::function<Status(CoordinatorModel::Turn&)> command, int tries) {
  auto answered = std::make_shared<bool>(false);
  Send("", true, [this, command, answered, what] {
    (void)coordinator->Deliver([this, command, answered, what](CoordinatorModel::Turn& turn) {
      const Status status = command(turn);
      turn.replies.push_back([this, answered, what, status] {
        Send("", false, [this, answered, what, status] {
          if (*answered) return;
          *answered = true;
          if (what.starts_with("job-") && !status.ok()) auditor.Fail(Join(what, " was refused: ", Message(status)));
          if (what.starts_with("job-") && submitted_.insert(what).second) --unsubmitted_;
        });
      });
    });
  });
  queue.After(kUserRetry, [this, what, command, answered, tries] {
    if (!*answered && tries > 1) Call(what, command, tries - 1);
  });
}

void World::Submit(const std::string& id, int number, Time at) {
  ++unsubmitted_;
  queue.After(at, [this, id, number] {
    v1::JobCreated created = Created(options.hours > 0 ? WideRecipe(number, options.shards) : JobRecipe(number));
    created.set_request_id("request-" + id);
    if (options.hours == 0) {
      created.mutable_policy()->set_tenant(number % 2 == 0 ? "even" : "odd");
      created.mutable_policy()->set_priority(number % 3 == 2 ? 1 : 0);
    }
    Call(id, [id, created](CoordinatorModel::Turn& turn) {
      return turn.core.CreateJob({.id = id, .created = created}, turn.now, &turn.events).status();
    }, kUserTries);
  });
}

void World::SubmitJobs() {
  // Over the first 90 % of a long run, so that the fleet has work nearly to its end.
  const Time span = options.hours > 0 ? static_cast<Time>(0.9 * static_cast<double>(scenario.fault_end)) : kMinute;
  for (int i = 0; i < scenario.jobs; ++i) {
    const int number = static_cast<int>(options.hours > 0 ? i : (options.seed * 3 + static_cast<uint64_t>(i)) % 12);
    Submit(Join("job-", i), number, span * i / scenario.jobs);
  }
}

void World::UserAction(int target, int variant) {
  const std::string id = Join("job-", target % scenario.jobs);
  v1::RequestMark mark;
  mark.set_key(Join("user/", ++calls_));
  const auto action = [id, variant](CoordinatorModel::Turn& turn) -> Status {
    jobs::Core& core = turn.core;
    switch (variant % 12) {
      case 0: return core.CancelJob(id, "the user", turn.now, &turn.events);
      case 1: return core.KillJob(id, "the user", turn.now, &turn.events);
      case 2: case 3: case 4: return core.PauseJob(id, "the user", turn.now, &turn.events);
      case 5: case 6: return core.ResumeJob(id, "the user", turn.now, &turn.events);
      case 7: case 8: return core.RetryJob(id, "the user", turn.now, &turn.events);
      case 9: {
        v1::TenantPolicy tenant;
        tenant.set_tenant(variant % 2 == 0 ? "even" : "odd");
        tenant.set_max_leases(static_cast<uint32_t>(1 + variant % 3));
        tenant.set_weight(1 + variant % 4);
        return core.SetTenant(tenant, turn.now, &turn.events);
      }
      default: {
        RF_ASSIGN_OR_RETURN(const jobs::JobState* job, core.FindJob(id));
        v1::JobPolicy policy = job->created.policy();
        policy.set_priority(variant % 5 - 2);
        if (variant % 7 == 0) policy.mutable_budget()->set_trials(1);
        return core.SetPolicy(id, policy, turn.now, &turn.events);
      }
    }
  };
  Call("action", [mark, action](CoordinatorModel::Turn& turn) {
    return turn.core.Once(mark, turn.now, &turn.events, [&] { return action(turn); });
  }, 3);
}

bool World::AllEnded() const {
  if (unsubmitted_ > 0 || !coordinator->up()) return false;
  const jobs::State& state = coordinator->core().state();
  return state.active.empty() && state.jobs.size() == submitted_.size();
}

void World::CheckEnd() {
  static std::map<std::string, std::string>* const undisturbed = new std::map<std::string, std::string>();  // by recipe
  coordinator->Compare();
  for (const auto& [id, job] : coordinator->core().state().jobs) {
    ++result.jobs;
    if (job.state != v1::Job::SUCCEEDED) continue;
    ++result.succeeded;
    if (options.hours > 0 || job.created.policy().has_budget()) continue;
    const std::string recipe = job.created.recipe().SerializeAsString();
    auto [known, is_new] = undisturbed->try_emplace(recipe);
    if (is_new) known->second = UndisturbedArtifact(job.created.recipe());
    if (job.artifact.digest() == known->second) continue;
    auditor.Fail(Join(id, " ended with the artifact ", job.artifact.digest(), ", undisturbed it is ", known->second));
  }
  for (const auto& [id, job] : coordinator->core().state().jobs) {
    if (job.reason.find("not in the store") != std::string::npos) auditor.Fail(Join(id, " failed for a loss: ", job.reason));
  }
  constexpr uint32_t kHarmless = kCoordinatorPause | kMessageDuplication | kClockJump | kSlowDisk | kBlobLoss;
  if ((scenario.faults & ~kHarmless) == 0 && options.hours == 0) {
    for (const auto& [id, job] : coordinator->core().state().jobs) {
      const bool diverged = job.reason.find("every trial diverged") != std::string::npos;
      if (job.state != v1::Job::SUCCEEDED && !diverged) auditor.Fail(Join(id, " failed although nothing did: ", job.reason));
    }
  }
}

Result World::Run() {
  coordinator->Start();
  for (const auto& worker : workers) worker->Start();
  SubmitJobs();
  for (size_t i = 0; i < planned_.size(); ++i) {
    if (options.no_planned_faults) break;
    if (!options.only_faults.empty() &&
        std::find(options.only_faults.begin(), options.only_faults.end(), static_cast<int>(i)) == options.only_faults.end()) {
      continue;
    }
    queue.After(planned_[i].time, [this, i] { StartFault(planned_[i]); });
  }
  // When everything heals, paused jobs go on, so that every job can end.
  bool resumed = false;
  while (!auditor.failed() && queue.RunNext()) {
    if (!resumed && queue.now() > scenario.fault_end + 2 * kMinute) {
      resumed = true;
      for (int i = 0; i < scenario.jobs && (scenario.faults & kUserAction) != 0; ++i) {
        Call("resume", [i](CoordinatorModel::Turn& turn) {
          return turn.core.ResumeJob(Join("job-", i), "", turn.now, &turn.events);
        }, kUserTries);
      }
    }
    if (queue.now() > scenario.fault_end && resumed && AllEnded()) break;
    if (queue.now() > scenario.limit) auditor.Fail("not every job ended in time after the faults had healed");
  }
  result.time = queue.now();
  if (!auditor.failed()) CheckEnd();
  return result;
}

}  // namespace refinery::simulation
