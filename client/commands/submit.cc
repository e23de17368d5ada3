// refinery submit, refinery plan.

#include <iostream>

#include "client/commands/commands.h"
#include "client/exit_code.h"
#include "client/local/local_programs.h"
#include "client/recipe_input.h"
#include "client/render/json.h"
#include "common/grpc_status.h"
#include "common/temporary_folder.h"

namespace refinery::client {
namespace {

StatusOr<int> Submit(const std::string& recipe, const std::string& request_id, bool validate_only, const v1::JobPolicy& policy,
                     const Globals& globals) {
  RF_ASSIGN_OR_RETURN(RecipeInput input, ReadRecipe(recipe, globals.data_folder));
  RF_ASSIGN_OR_RETURN(Connection connection, Connect(globals));
  RF_RETURN_IF_ERROR(UploadFiles(connection, input));
  RF_ASSIGN_OR_RETURN(v1::Job job, CreateJob(connection, input, request_id.empty() ? RandomRequestId() : request_id,
                                             validate_only, policy));
  if (globals.json) {
    std::cout << ToJson(job);
  } else if (validate_only) {
    std::cerr << "the recipe and its files are valid; models are looked at only when a job runs\n";
  } else {
    std::cout << job.id() << "\n";
    std::cerr << "submitted; follow it with `refinery watch " << job.id() << "`\n";
  }
  return kOk;
}

StatusOr<int> PrintPlan(Connection& connection, const RecipeInput& input, bool json) {
  v1::PlanJobRequest request;
  *request.mutable_recipe() = input.recipe;
  request.mutable_files()->insert(input.digests.begin(), input.digests.end());
  grpc::ClientContext context;
  SetDeadline(&context);
  v1::Plan plan;
  RF_RETURN_IF_ERROR(FromGrpc(connection.jobs->PlanJob(&context, request, &plan)));
  std::cout << (json ? ToJson(plan) : plan.text());
  return kOk;
}

StatusOr<int> Plan(const std::string& recipe, const Globals& globals) {
  RF_ASSIGN_OR_RETURN(RecipeInput input, ReadRecipe(recipe, globals.data_folder));
  if (globals.coordinator_given) {
    RF_ASSIGN_OR_RETURN(Connection connection, Connect(globals));
    return PrintPlan(connection, input, globals.json);
  }
  // Planning is the coordinator's work: one of our own, for this question only.
  RF_ASSIGN_OR_RETURN(TemporaryFolder folder, TemporaryFolder::Make("refinery-plan"));
  RF_ASSIGN_OR_RETURN(std::unique_ptr<LocalPrograms> programs, LocalPrograms::Open({.state = folder.path(), .worker = false}));
  Status started = programs->Start();
  StatusOr<Connection> connection = started.ok() ? Connect(programs->address()) : started;
  StatusOr<int> result = connection.ok() ? PrintPlan(*connection, input, globals.json) : connection.status();
  programs->StopIfLast();
  return result;
}

}  // namespace

void AddSubmit(CLI::App& app, Globals& globals, Result& result) {
  struct Flags {
    std::string recipe, request_id, tenant;
    int priority = 0;
    bool validate_only = false;
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* command = app.add_subcommand("submit", "Submit a recipe to a coordinator; prints the job's id");
  command->add_option("RECIPE", flags->recipe, "recipe file (YAML)")->required();
  command->add_option("--request-id", flags->request_id, "UUID; the same one gives the same job (default: a new one)");
  command->add_flag("--validate-only", flags->validate_only, "check the recipe and the files, make no job");
  command->add_option("--priority", flags->priority, "-1000 to 1000, the higher first")->check(CLI::Range(-1000, 1000));
  command->add_option("--tenant", flags->tenant, "whose job it is (default: the caller's)");
  command->callback([flags, &globals, &result] {
    v1::JobPolicy policy;
    policy.set_tenant(flags->tenant);
    policy.set_priority(flags->priority);
    result = Submit(flags->recipe, flags->request_id, flags->validate_only, policy, globals);
  });
}

void AddPlan(CLI::App& app, Globals& globals, Result& result) {
  auto recipe = std::make_shared<std::string>();
  CLI::App* command = app.add_subcommand("plan", "Print the task graph of a recipe without running it");
  command->add_option("RECIPE", *recipe, "recipe file (YAML)")->required();
  command->callback([recipe, &globals, &result] { result = Plan(*recipe, globals); });
}

}  // namespace refinery::client
