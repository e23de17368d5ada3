#include "server/api/fleet.h"

#include <algorithm>

#include "common/status.h"

namespace refinery::api {
namespace {

constexpr Milliseconds kForgetAfter = std::chrono::hours(1);

}  // namespace

bool Fleet::Seen(const v1::SynchronizeRequest& request, Milliseconds now) {
  Worker& worker = workers_[request.worker().id()];
  const bool brief = request.worker().brief();
  if (!brief || worker.incarnation != request.incarnation()) {
    if (worker.incarnation != request.incarnation()) worker.slots = 0;
    worker.info = request.worker();
    worker.incarnation = brief ? "" : request.incarnation();
  } else {
    worker.info.set_state(request.worker().state());
    worker.info.set_free_disk_bytes(request.worker().free_disk_bytes());
  }
  worker.last_seen = now;
  worker.slots = std::max(worker.slots, request.free_slots() + static_cast<uint32_t>(request.running_size()));
  worker.running.clear();
  for (const v1::RunningAttempt& running : request.running()) {
    worker.running.push_back(Join(running.lease().job(), "/", running.lease().path()));
  }
  return !worker.incarnation.empty();
}

std::function<void(const Status&)> Fleet::Open(Poll poll) {
  std::function<void(const Status&)> superseded;
  const auto found = polls_.find(poll.worker);
  if (found != polls_.end()) superseded = std::move(found->second.answer);
  const std::string worker = poll.worker;
  something_to_say_ |= !poll.response->grants().empty() || !poll.response->cancel().empty();
  next_deadline_ = polls_.empty() ? poll.deadline : std::min(next_deadline_, poll.deadline);
  polls_.insert_or_assign(worker, std::move(poll));
  return superseded;
}

std::function<void(const Status&)> Fleet::Close(const v1::SynchronizeResponse* response, Milliseconds now) {
  for (auto it = polls_.begin(); it != polls_.end(); ++it) {
    if (it->second.response != response) continue;
    workers_[it->first].last_seen = now;
    std::function<void(const Status&)> answer = std::move(it->second.answer);
    polls_.erase(it);
    return answer;
  }
  return {};
}

std::vector<scheduler::Worker> Fleet::Workers(Milliseconds now) const {
  std::vector<scheduler::Worker> workers;
  for (const auto& [id, worker] : workers_) {
    if (IsLost(id, worker, now)) continue;
    const auto poll = polls_.find(id);
    workers.push_back({.id = id,
                       .free_slots = poll == polls_.end() ? 0 : poll->second.free_slots,
                       .info = worker.incarnation.empty() ? nullptr : &worker.info,
                       .draining = worker.info.state() == "draining" || drained_.contains(id),
                       .slots = worker.slots});
  }
  return workers;
}

bool Fleet::HasFree() const {
  return std::any_of(polls_.begin(), polls_.end(), [](const auto& entry) { return entry.second.free_slots > 0; });
}

const v1::WorkerInfo* Fleet::InfoOf(const std::string& worker) const {
  const auto found = workers_.find(worker);
  return found == workers_.end() || found->second.incarnation.empty() ? nullptr : &found->second.info;
}

Poll* Fleet::PollOf(const std::string& worker) {
  something_to_say_ = true;
  const auto found = polls_.find(worker);
  return found == polls_.end() ? nullptr : &found->second;
}

void Fleet::Drain(const std::string& worker, bool drain) {
  if (!drain) {
    drained_.erase(worker);
  } else if (workers_.contains(worker)) {
    drained_.insert(worker);
  }
}

std::vector<Poll> Fleet::Take(Milliseconds now, bool all) {
  std::vector<Poll> taken;
  if (!all && !something_to_say_ && (polls_.empty() || next_deadline_ > now)) return taken;  // of a thousand, none
  something_to_say_ = false;
  next_deadline_ = Milliseconds::max();
  for (auto it = polls_.begin(); it != polls_.end();) {
    const Poll& poll = it->second;
    if (!all && poll.deadline > now && poll.response->grants().empty() && poll.response->cancel().empty()) {
      next_deadline_ = std::min(next_deadline_, poll.deadline);
      ++it;
      continue;
    }
    workers_[it->first].last_seen = now;
    taken.push_back(std::move(it->second));
    it = polls_.erase(it);
  }
  return taken;
}

bool Fleet::IsLost(const std::string& id, const Worker& worker, Milliseconds now) const {
  return !polls_.contains(id) && now - worker.last_seen > lease_ttl_;
}

std::vector<v1::WorkerInfo> Fleet::List(Milliseconds now) const {
  std::vector<v1::WorkerInfo> list;
  for (const auto& [id, worker] : workers_) {
    v1::WorkerInfo info = worker.info;
    if (IsLost(id, worker, now)) {
      info.set_state("lost");
    } else if (drained_.contains(id)) {
      info.set_state("draining");
    } else if (info.state() != "draining") {
      info.set_state(worker.running.empty() ? "idle" : "busy");
    }
    info.clear_running();
    for (const std::string& running : worker.running) info.add_running(running);
    info.set_last_seen_ms_ago(polls_.contains(id) ? 0 : (now - worker.last_seen).count());
    list.push_back(std::move(info));
  }
  return list;
}

Milliseconds Fleet::HeartbeatAge(Milliseconds now) const {
  Milliseconds age{0};
  for (const auto& [id, worker] : workers_) {
    if (!polls_.contains(id) && !IsLost(id, worker, now)) age = std::max(age, now - worker.last_seen);
  }
  return age;
}

void Fleet::Forget(Milliseconds now) {
  std::erase_if(workers_, [&](const auto& entry) {
    return !polls_.contains(entry.first) && now - entry.second.last_seen > kForgetAfter;
  });
}

}  // namespace refinery::api
