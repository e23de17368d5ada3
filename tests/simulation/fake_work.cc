#include "tests/simulation/fake_work.h"

#include "common/digest.h"
#include "common/recipe.h"
#include "server/plan/plan.h"

namespace refinery::simulation {
namespace {

constexpr uint64_t kDivergedOneIn = 9;

v1::Recipe BaseRecipe() {
  v1::Recipe recipe;
  recipe.set_name("simulated");
  recipe.mutable_student()->set_model("/models/student.gguf");
  recipe.mutable_data()->set_task("arc_easy");
  recipe.mutable_data()->set_description("Answer the question.");
  recipe.mutable_data()->mutable_seeds()->set_benchmark("arc_easy");
  recipe.mutable_data()->mutable_seeds()->set_split("train");
  recipe.mutable_data()->mutable_synthesize()->set_examples(8);
  v1::Parameter* parameter = recipe.mutable_search()->add_parameters();
  parameter->set_name("learning_rate");
  parameter->set_min(1e-4);
  parameter->set_max(1e-2);
  parameter->set_log(true);
  return recipe;
}

}  // namespace

v1::Recipe JobRecipe(int number) {
  v1::Recipe recipe = BaseRecipe();
  recipe.set_seed(static_cast<uint64_t>(number / 2));  // two jobs of one seed share their data stages
  const int trials = 2 + number % 2;
  recipe.mutable_data()->mutable_synthesize()->set_shards(1 + number % 3);
  recipe.mutable_search()->set_trials(trials);
  recipe.mutable_search()->set_initial_trials(trials);
  recipe.mutable_search()->set_replicates(1 + number % 2);
  FillDefaults(&recipe);
  return recipe;
}

v1::Recipe WideRecipe(int number, int shards) {
  v1::Recipe recipe = BaseRecipe();
  recipe.set_seed(static_cast<uint64_t>(number));
  recipe.mutable_data()->mutable_synthesize()->set_examples(static_cast<uint32_t>(shards));
  recipe.mutable_data()->mutable_synthesize()->set_shards(static_cast<uint32_t>(shards));
  recipe.mutable_search()->set_trials(8);
  recipe.mutable_search()->set_initial_trials(8);
  FillDefaults(&recipe);
  return recipe;
}

v1::JobCreated Created(const v1::Recipe& recipe) {
  v1::JobCreated created;
  *created.mutable_recipe() = recipe;
  (*created.mutable_files())["seeds"] = DigestOf("seeds");
  return created;
}

void SetOutcome(const v1::TaskSpec& spec, v1::CompleteTaskRequest* end) {
  const std::string output = plan::TaskDigest(spec, "output");
  if (spec.has_train() && DeriveSeed(8, output) % kDivergedOneIn == 0) {
    end->mutable_error()->set_failure_class(v1::NUMERIC);
    end->mutable_error()->set_message("the loss is NaN");
    return;
  }
  end->mutable_success()->mutable_output()->set_digest(output);
  end->mutable_success()->mutable_output()->set_size(1);
  if (!spec.has_train()) return;
  v1::Measurement* loss = end->mutable_success()->add_measurements();
  loss->set_name("validation_loss");
  loss->set_value(1.0 + static_cast<double>(DeriveSeed(7, output) % 1'000'000) / 1e6);
}

std::string UndisturbedArtifact(const v1::Recipe& recipe) {
  jobs::Core core({.code_version = "simulation"});
  jobs::Now now;
  jobs::Events events;
  RF_CHECK(core.CreateJob({.id = "job", .created = Created(recipe)}, now, &events).ok());
  for (;;) {
    const auto ready = core.ReadyTasks(now, 1);
    if (ready.empty()) break;
    const StatusOr<v1::Lease> lease = core.Grant(ready[0].job, ready[0].path, "worker", "life", now, &events);
    if (!lease.ok()) continue;
    v1::CompleteTaskRequest end;
    *end.mutable_lease() = lease->token();
    SetOutcome(lease->spec(), &end);
    RF_CHECK(core.Complete(end, now, &events).ok());
  }
  const jobs::JobState& job = core.state().jobs.at("job");
  for (size_t i = 0; i < job.tasks.size(); ++i) {
    if (job.plan.tasks[i].kind == v1::EXPORT) return job.tasks[i].output.digest();
  }
  return "";
}

}  // namespace refinery::simulation
