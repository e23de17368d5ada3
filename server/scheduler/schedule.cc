#include "server/scheduler/schedule.h"

#include <algorithm>
#include <optional>
#include <tuple>
#include <unordered_map>
#include <unordered_set>

#include "server/scheduler/match.h"

namespace refinery::scheduler {
namespace {

using jobs::JobKey;
using jobs::JobState;
using jobs::TaskState;

// No worker has more; a policy that was changed while its tasks ran may say any number, and the sum must not wrap around.
constexpr uint64_t kMostMemory = uint64_t{1} << 50;

// A worker during the pass.
struct Place {
  const Worker* worker = nullptr;
  uint32_t free = 0;
  Used used;
  bool used_known = false;
  std::set<std::string_view> cached;
};

// Places with room, those without devices apart, so that tasks that need none leave the devices to others.
class FreePlaces {
 public:
  void Insert(const std::vector<Place>& places, size_t i) {
    if (places[i].free > 0) Of(places[i]).insert({-static_cast<int64_t>(places[i].free), i});
  }
  void Erase(const std::vector<Place>& places, size_t i) {
    if (places[i].free > 0) Of(places[i]).erase({-static_cast<int64_t>(places[i].free), i});
  }
  bool empty() const { return plain_.empty() && with_devices_.empty(); }
  size_t size() const { return plain_.size() + with_devices_.size(); }
  // The first place, most room first, that `accept` takes.
  template <typename Accept>
  std::optional<size_t> Find(bool needs_devices, const Accept& accept) const {
    for (const auto* set : {&plain_, &with_devices_}) {
      if (needs_devices && set == &plain_) continue;
      for (const auto& [free, i] : *set) {
        if (accept(i)) return i;
      }
    }
    return std::nullopt;
  }

 private:
  using Set = std::set<std::pair<int64_t, size_t>>;  // (-free slots, place)
  Set& Of(const Place& place) {
    return HasAccelerators(place.worker->info) ? with_devices_ : plain_;
  }
  Set plain_, with_devices_;
};

// The tasks of one kind of one job, in order. They need the same.
struct Group {
  v1::TaskKind kind;
  const v1::Requirements* needs = nullptr;
  std::string shape;  // equal for equal needs
  std::set<size_t>::const_iterator next, end;
};

// A job whose tasks are being placed.
struct Cursor {
  const JobState* job = nullptr;
  std::vector<Group> groups;
  std::optional<std::vector<size_t>> known;  // places that ran tasks of the job
};

// A tenant in one level of priority.
struct Line {
  const std::string* tenant = nullptr;
  std::set<JobKey>::const_iterator next, end;
  std::optional<Cursor> cursor;
};

class Scheduler {
 public:
  Scheduler(const jobs::Core& core, const std::vector<Worker>& workers, const jobs::Now& now, const ScheduleOptions& options)
      : core_(core), state_(core.state()), workers_(workers), now_(now), options_(options) {
    const bool one_tenant = std::all_of(state_.queues.begin(), state_.queues.end(),
                                        [](const auto& level) { return level.second.size() == 1; });
    if (!one_tenant || !state_.tenants.empty()) usage_ = UsageOf(state_);  // else nothing depends on it
    for (const Worker& worker : workers) {
      if (!worker.draining) places_.push_back({.worker = &worker, .free = worker.free_slots});
    }
    std::sort(places_.begin(), places_.end(), [](const Place& a, const Place& b) { return a.worker->id < b.worker->id; });
    for (size_t i = 0; i < places_.size(); ++i) {
      Place& place = places_[i];
      by_id_[place.worker->id] = i;
      free_.Insert(places_, i);
      if (place.worker->info == nullptr || place.free == 0) continue;
      place.cached.insert(place.worker->info->cached().begin(), place.worker->info->cached().end());
      any_cached_ |= !place.cached.empty();
    }
  }

  Pass Run() {
    for (const auto& [priority, tenants] : state_.queues) {
      if (free_.empty() || pass_.grants.size() >= options_.max_grants) break;
      RunLevel(tenants);
    }
    if (MayPreempt()) Preempt();
    return std::move(pass_);
  }

 private:
  void RunLevel(const std::map<std::string, std::set<JobKey>>& tenants) {
    std::set<std::pair<double, size_t>> order;  // (share, line)
    std::vector<Line> lines;
    for (const auto& [tenant, jobs] : tenants) {
      order.insert({Share(tenant), lines.size()});
      lines.push_back({.tenant = &tenant, .next = jobs.begin(), .end = jobs.end()});
    }
    while (!order.empty() && !free_.empty() && pass_.grants.size() < options_.max_grants) {
      const size_t i = order.begin()->second;
      order.erase(order.begin());
      if (GrantNext(lines[i])) order.insert({Share(*lines[i].tenant), i});
    }
  }

  double Share(const std::string& tenant) const {
    const auto used = usage_.find(tenant);
    if (used == usage_.end()) return 0;
    const auto policy = state_.tenants.find(tenant);
    const double weight = policy == state_.tenants.end() || policy->second.weight() == 0 ? 1 : policy->second.weight();
    return used->second.leases / weight;
  }

  bool WithinQuota(const std::string& tenant, uint32_t leases, uint64_t devices) const {
    const auto policy = state_.tenants.find(tenant);
    if (policy == state_.tenants.end()) return true;
    const auto found = usage_.find(tenant);
    const Usage used = found == usage_.end() ? Usage() : found->second;
    return (policy->second.max_leases() == 0 || used.leases + leases <= policy->second.max_leases()) &&
           (policy->second.max_devices() == 0 || used.devices + devices <= policy->second.max_devices());
  }

  // Places the next task of the tenant, or its next gang; false when it has none left that can be placed.
  bool GrantNext(Line& line) {
    for (;;) {
      if (!line.cursor) {
        if (line.next == line.end) return false;
        line.cursor = Open(state_.jobs.at(line.next->second));
        ++line.next;
      }
      while (Group* group = Next(*line.cursor)) {
        if (Grant(*line.tenant, *line.cursor, *group)) return true;
        if (free_.empty()) return false;
      }
      line.cursor.reset();
    }
  }

  Cursor Open(const JobState& job) {
    Cursor cursor{.job = &job};
    for (const auto& [kind, tasks] : job.ready) {
      const v1::Requirements& needs = job.RequirementsOf(kind);
      cursor.groups.push_back({kind, &needs, needs.SerializeAsString(), tasks.begin(), tasks.end()});
    }
    return cursor;
  }

  // The group whose next task is the first in the plan; null when all are through.
  Group* Next(Cursor& cursor) {
    Group* first = nullptr;
    for (Group& group : cursor.groups) {
      if (failed_.contains(group.shape)) group.next = group.end;
      if (group.next != group.end && (first == nullptr || *group.next < *first->next)) first = &group;
    }
    return first;
  }

  // Whether the task may be granted at all now; the first of several with one identity is.
  bool IsDue(const TaskState& task) const {
    return task.not_before <= now_.steady && !state_.running.contains(task.digest) && !coming_.contains(task.digest);
  }

  // Tries to place the next task or gang of the group and moves on behind it.
  bool Grant(const std::string& tenant, Cursor& cursor, Group& group) {
    const JobState& job = *cursor.job;
    const size_t size = std::max(1u, group.needs->gang());
    std::vector<size_t> members;
    bool others_come = false;  // a member of the gang is tried again soon
    for (; group.next != group.end && members.size() < size; ++group.next) {
      if (IsDue(job.tasks[*group.next])) members.push_back(*group.next);
      others_come |= size > 1 && job.tasks[*group.next].not_before > now_.steady;
    }
    if (members.empty() || (members.size() < size && others_come)) return false;
    const auto count = static_cast<uint32_t>(members.size());
    const uint64_t devices = uint64_t{count} * group.needs->devices();
    if (!WithinQuota(tenant, count, devices)) {
      group.next = group.end;
      return false;
    }
    std::vector<size_t> taken;
    for (const size_t i : members) {
      const std::optional<size_t> place = Pick(cursor, group, job.tasks[i]);
      if (!place) break;
      Take(*place, *group.needs);
      taken.push_back(*place);
    }
    if (taken.size() < members.size()) {
      for (const size_t place : taken) GiveBack(place, *group.needs);
      if (size > 1) return HoldFor(group, job.tasks[members.front()], count);
      if (job.tasks[members.front()].avoid.empty()) failed_.insert(group.shape);  // nobody with these needs fits any more
      return false;
    }
    gangs_ += size > 1;
    for (size_t m = 0; m < members.size(); ++m) {
      const TaskState& task = job.tasks[members[m]];
      if (!task.digest.empty()) coming_.insert(task.digest);
      pass_.grants.push_back({job.id, job.plan.tasks[members[m]].path, std::string(places_[taken[m]].worker->id),
                              size > 1 ? gangs_ : 0});
    }
    Usage& used = usage_[tenant];
    used.leases += count;
    used.devices += devices;
    return true;
  }

  // A gang that has waited long enough keeps the workers it needs free of others, if that can ever be enough for it. Always false:
  // nothing was granted.
  bool HoldFor(Group& group, const TaskState& first, uint32_t members) {
    group.next = group.end;
    if (now_.steady - first.ready_since < options_.gang_patience) return false;
    if (RoomFor(state_, workers_, *group.needs) < members) return false;
    for (size_t i = 0; i < places_.size(); ++i) {
      if (places_[i].free == 0 || !CanEver(places_[i].worker->info, *group.needs)) continue;
      SetFree(i, 0);
    }
    return false;
  }

  const Used& UsedOf(Place& place) {
    if (place.used_known) return place.used;
    place.used_known = true;
    const auto leases = state_.worker_leases.find(std::string(place.worker->id));
    if (leases == state_.worker_leases.end()) return place.used;
    for (const auto& [id, i] : leases->second) {
      const JobState& job = state_.jobs.at(id);
      const v1::Requirements& needs = job.RequirementsOf(job.plan.tasks[i].kind);
      place.used.devices += needs.devices();
      place.used.memory_bytes += std::min(needs.memory_bytes(), kMostMemory);
    }
    return place.used;
  }

  bool Fits(Place& place, const Group& group, const TaskState& task, bool may_avoid) {
    if (place.free == 0) return false;
    if (may_avoid && task.avoid.contains(std::string(place.worker->id))) return false;
    return group.shape.empty() || CanNow(place.worker->info, UsedOf(place), *group.needs);
  }

  std::optional<size_t> Pick(Cursor& cursor, const Group& group, const TaskState& task) {
    const bool may_avoid = !task.avoid.empty() && std::any_of(places_.begin(), places_.end(), [&](const Place& place) {
      return !task.avoid.contains(std::string(place.worker->id)) && CanEver(place.worker->info, *group.needs);
    });
    if (any_cached_) {
      if (const auto place = PickCached(group, task, may_avoid)) return place;
    }
    if (!cursor.known) cursor.known = KnownPlaces(*cursor.job);
    std::optional<size_t> best;
    for (const size_t i : *cursor.known) {
      if (Fits(places_[i], group, task, may_avoid) && (!best || places_[i].free > places_[*best].free)) best = i;
    }
    if (best) return best;
    return free_.Find(NeedsAccelerators(*group.needs), [&](size_t i) { return Fits(places_[i], group, task, may_avoid); });
  }

  // The free place that holds most bytes of the task's inputs; none when none holds any.
  std::optional<size_t> PickCached(const Group& group, const TaskState& task, bool may_avoid) {
    std::optional<size_t> best;
    uint64_t most = 0;
    (void)free_.Find(false, [&](size_t i) {
      uint64_t bytes = 0;
      for (const v1::ArtifactRef& input : task.spec.inputs()) {
        if (places_[i].cached.contains(input.digest())) bytes += input.size() + 1;
      }
      if (bytes > most && Fits(places_[i], group, task, may_avoid)) {
        most = bytes;
        best = i;
      }
      return false;  // look at all
    });
    return best;
  }

  // Places with room that ran tasks of the job, by id.
  std::vector<size_t> KnownPlaces(const JobState& job) const {
    std::vector<size_t> known;
    if (job.workers.size() < free_.size()) {
      for (const std::string& worker : job.workers) {
        const auto found = by_id_.find(worker);
        if (found != by_id_.end() && places_[found->second].free > 0) known.push_back(found->second);
      }
      return known;
    }
    (void)free_.Find(false, [&](size_t i) {
      if (job.workers.contains(std::string(places_[i].worker->id))) known.push_back(i);
      return false;  // look at all
    });
    std::sort(known.begin(), known.end());
    return known;
  }

  void SetFree(size_t i, uint32_t free) {
    free_.Erase(places_, i);
    places_[i].free = free;
    free_.Insert(places_, i);
  }
  void Take(size_t i, const v1::Requirements& needs) {
    SetFree(i, places_[i].free - 1);
    if (needs.devices() == 0 && needs.memory_bytes() == 0) return;
    UsedOf(places_[i]);
    places_[i].used.devices += needs.devices();
    places_[i].used.memory_bytes += needs.memory_bytes();
  }
  void GiveBack(size_t i, const v1::Requirements& needs) {
    SetFree(i, places_[i].free + 1);
    if (!places_[i].used_known) return;
    places_[i].used.devices -= needs.devices();
    places_[i].used.memory_bytes -= needs.memory_bytes();
  }

  // Whether a job of lower priority than one that waits may hold leases at all.
  bool MayPreempt() const {
    if (state_.queues.empty() || state_.leases.empty()) return false;
    return std::any_of(state_.active.begin(), state_.active.end(), [&](const JobKey& key) {
      const JobState& job = state_.jobs.at(key.second);
      return job.priority() < state_.queues.begin()->first && !job.leased.empty();
    });
  }
  // Takes leases back for the tasks of the highest priority that could not be placed.
  void Preempt();
  size_t Wanted(int32_t priority, std::vector<const v1::Requirements*>* needs) const;

  const jobs::Core& core_;
  const jobs::State& state_;
  const std::vector<Worker>& workers_;
  const jobs::Now now_;
  const ScheduleOptions& options_;
  std::map<std::string, Usage> usage_;
  std::vector<Place> places_;                          // by id
  std::unordered_map<std::string_view, size_t> by_id_;
  FreePlaces free_;
  std::unordered_set<std::string> failed_;             // shapes that no free place fits any more
  std::unordered_set<std::string> coming_;             // identities granted in this pass
  bool any_cached_ = false;
  uint32_t gangs_ = 0;                                 // granted in this pass
  Pass pass_;
};

// Tasks of `priority` that wait although they are due and within quota, and what they need.
size_t Scheduler::Wanted(int32_t priority, std::vector<const v1::Requirements*>* needs) const {
  std::set<std::pair<std::string_view, std::string_view>> granted;
  for (const Decision& decision : pass_.grants) granted.insert({decision.job, decision.path});
  size_t wanted = 0;
  for (const auto& [tenant, jobs] : state_.queues.at(priority)) {
    for (const auto& [seq, id] : jobs) {
      const JobState& job = state_.jobs.at(id);
      for (const auto& [kind, tasks] : job.ready) {
        const v1::Requirements& need = job.RequirementsOf(kind);
        if (!WithinQuota(tenant, 1, need.devices())) continue;
        size_t count = 0;
        for (const size_t i : tasks) {
          const TaskState& task = job.tasks[i];
          count += task.not_before <= now_.steady && !granted.contains({id, job.plan.tasks[i].path}) && IsDue(task);
          if (count >= options_.max_grants) break;
        }
        if (count == 0) continue;
        needs->push_back(&need);
        wanted += count;
        if (wanted >= options_.max_grants) return wanted;
      }
    }
  }
  return wanted;
}

void Scheduler::Preempt() {
  const int32_t priority = state_.queues.begin()->first;
  struct Victim {
    int32_t priority;
    std::chrono::milliseconds age;  // the smaller, the later it became ready
    const JobState* job;
    size_t task;
  };
  std::vector<Victim> victims;
  size_t coming = 0;  // leases that are being taken back already
  const JobState* job = nullptr;
  for (const auto& [id, i] : state_.leases) {
    if (job == nullptr || job->id != id) job = &state_.jobs.at(id);
    if (job->priority() >= priority) continue;
    const v1::TaskKind kind = job->plan.tasks[i].kind;
    if (kind != v1::TRAIN && kind != v1::QUANTIZE && kind != v1::RECOVER) continue;  // the others write no checkpoints
    if (job->tasks[i].release_at.count() >= 0) {
      ++coming;
    } else {
      victims.push_back({job->priority(), -job->tasks[i].ready_since, job, i});
    }
  }
  if (victims.empty()) return;
  std::vector<const v1::Requirements*> needs;
  const size_t wanted = Wanted(priority, &needs);
  if (wanted <= coming) return;
  std::sort(victims.begin(), victims.end(), [](const Victim& a, const Victim& b) {
    return std::tie(a.priority, a.age, a.job->id, a.task) < std::tie(b.priority, b.age, b.job->id, b.task);
  });
  for (const Victim& victim : victims) {
    const std::string& worker = victim.job->tasks[victim.task].worker;
    const auto place = by_id_.find(worker);
    const bool helps = place != by_id_.end() && std::any_of(needs.begin(), needs.end(), [&](const v1::Requirements* need) {
      return CanEver(places_[place->second].worker->info, *need);
    });
    if (!helps) continue;
    pass_.preemptions.push_back({victim.job->id, victim.job->plan.tasks[victim.task].path, worker});
    if (++coming >= wanted) return;
  }
}

}  // namespace

std::map<std::string, Usage> UsageOf(const jobs::State& state) {
  std::map<std::string, Usage> usage;
  const JobState* job = nullptr;
  for (const auto& [id, i] : state.leases) {
    if (job == nullptr || job->id != id) job = &state.jobs.at(id);
    Usage& used = usage[job->tenant()];
    ++used.leases;
    used.devices += job->RequirementsOf(job->plan.tasks[i].kind).devices();
  }
  return usage;
}

uint64_t RoomFor(const jobs::State& state, const std::vector<Worker>& workers, const v1::Requirements& needs) {
  uint64_t room = 0;
  for (const Worker& worker : workers) {
    if (worker.draining) continue;
    // Between an attempt's end and the next poll a slot is neither free nor leased, so what the worker said counts too.
    const auto leases = state.worker_leases.find(std::string(worker.id));
    const uint64_t known = worker.free_slots + (leases == state.worker_leases.end() ? 0 : leases->second.size());
    room += MostAtOnce(worker.info, needs, std::max<uint64_t>(worker.slots, known));
  }
  return room;
}

Pass Schedule(const jobs::Core& core, const std::vector<Worker>& workers, const jobs::Now& now, const ScheduleOptions& options) {
  return Scheduler(core, workers, now, options).Run();
}

}  // namespace refinery::scheduler
