// The part of the core that is about tasks which run together or not at all.

#include "server/jobs/core.h"
#include "server/jobs/text.h"

namespace refinery::jobs {

StatusOr<std::vector<v1::Lease>> Core::GrantGang(const std::string& job_id, const std::vector<Member>& members,
                                                 const std::string& address, uint32_t port, const Now& now, Events* events) {
  // A member whose result is in the cache takes it and is not ready any more, so nothing has changed when all of them are.
  std::vector<size_t> tasks;
  for (const Member& member : members) {
    RF_ASSIGN_OR_RETURN(const size_t i, Grantable(job_id, member.path, now, events));
    tasks.push_back(i);
  }
  if (tasks.empty()) return InvalidArgument("a gang has at least one member");
  JobState& job = Job(job_id);
  v1::Gang gang;
  gang.set_id(Join(members[0].path, "#", job.tasks[tasks[0]].epoch + 1));  // no task is first in two gangs with one epoch
  gang.set_world_size(static_cast<uint32_t>(members.size()));
  gang.set_address(address);
  gang.set_port(port);
  std::vector<v1::Lease> leases;
  for (size_t m = 0; m < members.size(); ++m) {
    gang.set_rank(static_cast<uint32_t>(m));
    leases.push_back(EmitLeased(job, tasks[m], members[m], gang, now, events));
  }
  return leases;
}

void Core::ReleaseGang(const std::string& id, const v1::Gang& gang, const std::string& lost, const Now& now, Events* events) {
  if (gang.world_size() < 2) return;
  JobState& job = Job(id);
  const std::set<size_t> leased = job.leased;
  for (const size_t i : leased) {
    const TaskState& task = job.tasks[i];
    if (task.gang.id() != gang.id()) continue;
    v1::Event event;
    v1::LeaseReleased* released = event.mutable_lease_released();
    released->set_path(job.plan.tasks[i].path);
    released->set_epoch(task.epoch);
    released->set_worker(task.worker);
    released->set_reason(Cut(Join("its gang of ", gang.world_size(), " lost ", lost)));
    Emit(id, std::move(event), now, events);
  }
}

}  // namespace refinery::jobs
