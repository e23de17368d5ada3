// tests/server/jobs/tiny_job.h
//
// A small recipe with every stage in it (two trials with two replicates, learning rate searched), and a driver that plays the
// workers against the pure core under a clock of its own.

#pragma once

#include <algorithm>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "common/digest.h"
#include "common/recipe.h"
#include "server/jobs/core.h"

namespace refinery::testing {

inline v1::Recipe TinyRecipe() {
  v1::Recipe recipe;
  recipe.set_name("tiny");
  recipe.mutable_student()->set_model("/models/student.gguf");
  recipe.mutable_data()->set_task("arc_easy");
  recipe.mutable_data()->set_description("Answer the question.");
  recipe.mutable_data()->mutable_seeds()->set_benchmark("arc_easy");
  recipe.mutable_data()->mutable_seeds()->set_split("train");
  recipe.mutable_data()->mutable_synthesize()->set_examples(8);
  recipe.mutable_search()->set_trials(2);
  recipe.mutable_search()->set_initial_trials(2);
  recipe.mutable_search()->set_replicates(2);
  v1::Parameter* parameter = recipe.mutable_search()->add_parameters();
  parameter->set_name("learning_rate");
  parameter->set_min(1e-4);
  parameter->set_max(1e-2);
  parameter->set_log(true);
  v1::Benchmark* benchmark = recipe.mutable_evaluate()->add_benchmarks();
  benchmark->set_name("arc_easy");
  benchmark->set_limit(10);
  FillDefaults(&recipe);
  return recipe;
}

inline std::vector<std::string> TinyFileRoles() { return {"seeds", "benchmark/arc_easy"}; }

// The core with a clock that only moves when told to.
class CoreDriver {
 public:
  explicit CoreDriver(jobs::CoreOptions options = {}) : core(WithVersion(std::move(options))) {}

  static jobs::CoreOptions WithVersion(jobs::CoreOptions options) {
    if (options.code_version.empty()) options.code_version = "test";
    return options;
  }

  StatusOr<std::string> Create(const std::string& id, const std::string& request_id = "", const v1::Recipe& recipe = TinyRecipe()) {
    jobs::Core::NewJob job{.id = id};
    *job.created.mutable_recipe() = recipe;
    for (const std::string& role : TinyFileRoles()) (*job.created.mutable_files())[role] = DigestOf(role);
    job.created.set_request_id(request_id);
    return core.CreateJob(job, now, &events);
  }

  // The core hears the clock every second, as it does from the coordinator.
  void Wait(int64_t ms) {
    for (; ms > 0; ms -= 1000) {
      now.steady += std::chrono::milliseconds(std::min<int64_t>(ms, 1000));
      now.unix_ms += std::min<int64_t>(ms, 1000);
      core.Tick(now, &events);
    }
  }

  // Grants the first ready task; empty token when there is none.
  v1::Lease Grant(const std::string& worker = "w1", const std::string& incarnation = "i1") {
    for (;;) {
      const std::vector<jobs::Core::ReadyTask> ready = core.ReadyTasks(now, 1);
      if (ready.empty()) return {};
      StatusOr<v1::Lease> lease = core.Grant(ready[0].job, ready[0].path, worker, incarnation, now, &events);
      if (lease.ok()) return *std::move(lease);
      RF_CHECK(Task(ready[0].job, ready[0].path).state == v1::Task::CACHED);
    }
  }

  // What a worker says that runs these leases.
  static v1::SynchronizeRequest Running(const std::vector<v1::Lease>& running, const std::string& worker = "w1",
                                        const std::string& incarnation = "i1") {
    v1::SynchronizeRequest request;
    request.mutable_worker()->set_id(worker);
    request.set_incarnation(incarnation);
    for (const v1::Lease& lease : running) *request.add_running()->mutable_lease() = lease.token();
    return request;
  }

  jobs::Core::Report Synchronize(const std::vector<v1::Lease>& running, const std::string& worker = "w1",
                                 const std::string& incarnation = "i1") {
    return core.Synchronize(Running(running, worker, incarnation), now, &events);
  }

  // A success whose output depends on the task alone, and the loss where the task trains.
  static v1::CompleteTaskRequest Success(const v1::Lease& lease, double loss = 2.0) {
    v1::CompleteTaskRequest request;
    *request.mutable_lease() = lease.token();
    request.mutable_success()->mutable_output()->set_digest(DigestOf(lease.token().path()));
    request.mutable_success()->mutable_output()->set_size(1);
    request.mutable_success()->set_seconds(1.5);
    if (lease.spec().has_train()) {
      v1::Measurement* measurement = request.mutable_success()->add_measurements();
      measurement->set_name("validation_loss");
      measurement->set_value(loss);
    }
    return request;
  }

  static v1::CompleteTaskRequest Failure(const v1::Lease& lease, v1::FailureClass failure_class,
                                         const std::string& message = "it broke") {
    v1::CompleteTaskRequest request;
    *request.mutable_lease() = lease.token();
    request.mutable_error()->set_failure_class(failure_class);
    request.mutable_error()->set_message(message);
    return request;
  }

  Status Complete(const v1::CompleteTaskRequest& request) { return core.Complete(request, now, &events); }

  // Runs ready tasks, one after the other, until `stop` says so of a granted lease or nothing is ready. Returns the last
  // lease, which was not completed if `stop` asked.
  v1::Lease RunUntil(const std::function<bool(const v1::Lease&)>& stop) {
    for (;;) {
      v1::Lease lease = Grant();
      if (lease.token().path().empty() || stop(lease)) return lease;
      RF_CHECK(Complete(Success(lease, LossOf(lease))).ok());
    }
  }
  void RunAll() {
    RunUntil([](const v1::Lease&) { return false; });
    for (const std::string& job : core.JobsWithoutReport()) {
      v1::ArtifactRef report;
      report.set_digest(DigestOf("report of " + job));
      RF_CHECK(core.WriteReport(job, report, now, &events).ok());
    }
  }

  // Trial 1 is better than trial 0, and in both replicate 1 than replicate 0.
  static double LossOf(const v1::Lease& lease) {
    const std::string& path = lease.token().path();
    return 3.0 - (path.find("trial/1") == 0 ? 1.0 : 0.0) - (path.ends_with("replicate/1") ? 0.25 : 0.0);
  }

  const jobs::JobState& Job(const std::string& id) const { return core.state().jobs.at(id); }
  const jobs::TaskState& Task(const std::string& id, const std::string& path) const { return *Job(id).Find(path); }

  // What a restart makes of the events so far: each one serialized and read again.
  jobs::Core Replayed() const {
    jobs::Core replayed(WithVersion({}));
    for (const v1::Event& event : events) {
      v1::Event copy;
      RF_CHECK(copy.ParseFromString(event.SerializeAsString()));
      RF_CHECK(replayed.Replay(copy).ok());
    }
    return replayed;
  }

  jobs::Now now{.steady = std::chrono::milliseconds(1'000'000), .unix_ms = 1'700'000'000'000};
  jobs::Events events;
  jobs::Core core;
};

}  // namespace refinery::testing
