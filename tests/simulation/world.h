// tests/simulation/world.h
//
// What the parts of one run share: time, randomness, the network between workers and coordinator, and the faults to come.

#pragma once

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "tests/simulation/auditor.h"
#include "tests/simulation/coordinator_model.h"
#include "tests/simulation/event_queue.h"
#include "tests/simulation/options.h"
#include "tests/simulation/random.h"

namespace refinery::simulation {

class WorkerModel;

// What follows from options and seed.
struct Scenario {
  int jobs = 1;
  int workers = 1;
  uint32_t slots = 1;
  uint32_t faults = 0;         // kinds
  double loss = 0;             // of each message
  double duplication = 0;
  double delay = 0;
  double task_failure = 0;     // of each attempt
  double task_hang = 0;
  Time fault_end = 0;          // then everything heals
  Time step_low = 500, step_high = 8'000;  // of a task; it has 2 to 6
  Time limit = 0;              // every job must have ended by then
  CoordinatorSettings coordinator;
};

// Something that is going to happen at a time of its own.
struct PlannedFault {
  Time time = 0;
  FaultKind kind = kCoordinatorCrash;
  int target = 0;              // worker or job
  int variant = 0;
  Time duration = 0;
};

class World {
 public:
  explicit World(const SimulationOptions& options);
  ~World();
  Result Run();

  // Carries an action over the network between `worker` and the coordinator, perhaps late, twice or never. Users ("") have a
  // network of their own.
  void Send(const std::string& worker, bool to_coordinator, const std::function<void()>& action);
  bool Is(FaultKind kind) const { return (scenario.faults & kind) != 0 && queue.now() < scenario.fault_end; }

  SimulationOptions options;
  Scenario scenario;
  Result result;
  EventQueue queue;
  Auditor auditor;
  Random network;
  std::unique_ptr<CoordinatorModel> coordinator;
  std::vector<std::unique_ptr<WorkerModel>> workers;

 private:
  void Plan();
  void PlanLong();
  void StartFault(const PlannedFault& fault);
  void EndFault(const PlannedFault& fault);
  void SubmitJobs();
  void Submit(const std::string& id, int number, Time at);
  void Call(const std::string& what, std::function<Status(CoordinatorModel::Turn&)> command, int tries);
  void UserAction(int target, int variant);
  bool AllEnded() const;
  void CheckEnd();

  Random plan_random_;
  std::vector<PlannedFault> planned_;
  struct Cut {
    int to = 0, from = 0;  // nested
  };
  std::map<std::string, Cut> cuts_;
  std::set<std::string> submitted_;  // and acknowledged
  int unsubmitted_ = 0;
  int calls_ = 0;                    // of users, with request ids
  bool full_disk_ = false;
};

}  // namespace refinery::simulation
