// refinery run: coordinator and worker on this machine, one job, its result.

#include <iostream>

#include "client/commands/commands.h"
#include "client/commands/result.h"
#include "client/exit_code.h"
#include "client/follow.h"
#include "client/interrupt.h"
#include "client/local/local_programs.h"
#include "client/recipe_input.h"
#include "client/render/job_text.h"
#include "client/render/json.h"

namespace refinery::client {
namespace {

struct RunFlags {
  std::string recipe;
  std::string state;
  std::string cache;
  std::string task_program;
  bool fresh = false;
  bool stop = false;
};

// The job of this content: the one submitted here before, unless it failed or a fresh one is wanted.
StatusOr<v1::Job> FindOrCreateJob(Connection& connection, LocalPrograms& programs, const RecipeInput& input, bool fresh) {
  std::string content = ContentDigest(input);
  RF_ASSIGN_OR_RETURN(std::string request_id, programs.RequestId(content));
  if (request_id.empty()) request_id = RequestIdOf(content);
  if (fresh) request_id = RandomRequestId();
  RF_RETURN_IF_ERROR(UploadFiles(connection, input));
  RF_ASSIGN_OR_RETURN(v1::Job job, CreateJob(connection, input, request_id));
  if (job.state() == v1::Job::FAILED || job.state() == v1::Job::CANCELLED) {
    std::cerr << "job " << job.id() << " of this recipe " << StateName(job.state())
              << " earlier; trying again (what it had finished is reused)\n";
    request_id = RandomRequestId();
    RF_ASSIGN_OR_RETURN(job, CreateJob(connection, input, request_id));
  }
  RF_RETURN_IF_ERROR(programs.SetRequestId(content, request_id));
  return job;
}

StatusOr<int> Finish(Connection& connection, const v1::Job& job, const Globals& globals,
                     const std::filesystem::path& folder) {
  if (job.state() != v1::Job::SUCCEEDED) {
    if (globals.json) std::cout << ToJson(job);
    std::cerr << "refinery: " << FailureText(job) << "\n";
    return ExitCodeOf(job);
  }
  RF_RETURN_IF_ERROR(FetchResult(connection, job, folder));
  if (globals.json) {
    std::cout << ToJson(job);
    return kOk;
  }
  RF_ASSIGN_OR_RETURN(std::string table, ReportTable(connection, job));
  std::cout << table << "\nartifact  " << (folder / "artifact").string() << "\nreport    "
            << (folder / "report" / "report.html").string() << "\n";
  return kOk;
}

StatusOr<int> RunHere(const RunFlags& flags, const Globals& globals) {
  RF_ASSIGN_OR_RETURN(RecipeInput input, ReadRecipe(flags.recipe, globals.data_folder));
  LocalOptions options{.state = flags.state.empty() ? DefaultStateFolder(input.recipe.name())
                                                    : std::filesystem::path(flags.state),
                       .worker_cache = flags.cache,
                       .task_program = flags.task_program};
  RF_ASSIGN_OR_RETURN(std::unique_ptr<LocalPrograms> programs, LocalPrograms::Open(options));
  if (flags.stop) {
    if (!programs->StopIfLast())
      return FailedPrecondition("another `refinery run` follows a job there; end it with Ctrl-C first");
    std::cerr << "stopped; `refinery run " << flags.recipe << "` goes on where the job is\n";
    return kOk;
  }
  Interrupt interrupt;
  RF_RETURN_IF_ERROR(programs->Start());
  std::cerr << (programs->attached() ? "attached to" : "started") << " refineryd and refinery-worker at "
            << programs->address() << " (state and logs in " << options.state.string() << ")\n";
  RF_ASSIGN_OR_RETURN(Connection connection, Connect(programs->address()));
  RF_ASSIGN_OR_RETURN(v1::Job job, FindOrCreateJob(connection, *programs, input, flags.fresh));

  FollowOptions follow;
  follow.interrupt = &interrupt;
  follow.json = false;
  follow.supervise = [&] { return programs->Supervise(); };
  StatusOr<v1::Job> ended = FollowJob(connection, job.id(), follow);
  if (ended.status().code() == absl::StatusCode::kCancelled) {
    std::cerr << "\ndetached; job " << job.id() << " goes on. To come back:\n  refinery run " << flags.recipe
              << (flags.state.empty() ? "" : " --state " + flags.state) << "\nor\n  refinery --coordinator "
              << programs->address() << " watch " << job.id() << "\nTo stop its programs: add --stop to the first.\n";
    return kDetached;
  }
  if (!ended.ok()) return ended.status();
  StatusOr<int> code = Finish(connection, *ended, globals, std::filesystem::absolute(options.state) / "result" / job.id());
  programs->StopIfLast();
  return code;
}

}  // namespace

void AddRun(CLI::App& app, Globals& globals, Result& result) {
  auto flags = std::make_shared<RunFlags>();
  CLI::App* command = app.add_subcommand(
      "run", "Run a recipe on this machine: start coordinator and worker, submit, follow, fetch the result");
  command->add_option("RECIPE", flags->recipe, "recipe file (YAML)")->required();
  command->add_option("--state", flags->state,
                      "folder for jobs, logs and results (default ~/.local/state/refinery/<recipe name>)");
  command->add_option("--cache", flags->cache, "the worker's cache (default ~/.cache/refinery)");
  command->add_option("--task-program", flags->task_program, "refinery-task to use (default: beside this program)");
  command->add_flag("--fresh", flags->fresh, "a new job, although this recipe was run before");
  command->add_flag("--stop", flags->stop, "stop the programs that an earlier run left behind");
  command->callback([flags, &globals, &result] { result = RunHere(*flags, globals); });
}

}  // namespace refinery::client
