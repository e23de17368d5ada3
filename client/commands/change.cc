// refinery pause, resume, retry, kill, priority.

#include <iostream>

#include "client/commands/commands.h"
#include "client/exit_code.h"
#include "client/recipe_input.h"
#include "client/render/job_text.h"
#include "client/render/json.h"
#include "common/grpc_status.h"

namespace refinery::client {
namespace {

using Verb = grpc::Status (v1::JobService::Stub::*)(grpc::ClientContext*, const v1::ChangeJobRequest&, v1::Job*);

int Show(const v1::Job& job, const Globals& globals) {
  if (globals.json) {
    std::cout << ToJson(job);
  } else {
    std::cerr << "job " << job.id() << " is " << StateName(job.state()) << "\n";
  }
  return kOk;
}

// One sentence, also when there was nothing left to do.
int ShowEnded(const v1::Job& job, const Globals& globals) {
  if (globals.json || (job.state() != v1::Job::SUCCEEDED && job.state() != v1::Job::FAILED)) return Show(job, globals);
  std::cerr << "job " << job.id() << " had ended before: it has " << StateName(job.state()) << "\n";
  return kOk;
}

StatusOr<int> Change(Verb verb, const std::string& id, const std::string& reason, const Globals& globals) {
  RF_ASSIGN_OR_RETURN(Connection connection, Connect(globals));
  grpc::ClientContext context;
  SetDeadline(&context);
  v1::ChangeJobRequest request;
  request.set_id(id);
  request.set_reason(reason);
  request.set_request_id(RandomRequestId());
  v1::Job job;
  RF_RETURN_IF_ERROR(FromGrpc((connection.jobs.get()->*verb)(&context, request, &job)));
  return ShowEnded(job, globals);
}

StatusOr<int> SetPriority(const std::string& id, int priority, const Globals& globals) {
  RF_ASSIGN_OR_RETURN(Connection connection, Connect(globals));
  RF_ASSIGN_OR_RETURN(const v1::Job job, GetJob(connection, id));
  grpc::ClientContext context;
  SetDeadline(&context);
  v1::UpdateJobRequest request;
  request.set_id(job.id());
  *request.mutable_policy() = job.policy();
  request.mutable_policy()->set_priority(priority);
  request.set_request_id(RandomRequestId());
  v1::Job changed;
  RF_RETURN_IF_ERROR(FromGrpc(connection.jobs->UpdateJob(&context, request, &changed)));
  return Show(changed, globals);
}

void AddVerb(CLI::App& app, const char* name, const char* help, Verb verb, Globals& globals, Result& result) {
  struct Flags {
    std::string id, reason;
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* command = app.add_subcommand(name, help);
  command->add_option("JOB", flags->id, "id of a job, or the beginning of one")->required();
  command->add_option("--reason", flags->reason, "shown in the job's description");
  command->callback([flags, verb, &globals, &result] { result = Change(verb, flags->id, flags->reason, globals); });
}

}  // namespace

void AddChanges(CLI::App& app, Globals& globals, Result& result) {
  using Stub = v1::JobService::Stub;
  AddVerb(app, "pause", "Take a job's workers away at the next checkpoint", &Stub::PauseJob, globals, result);
  AddVerb(app, "resume", "Let a paused job go on", &Stub::ResumeJob, globals, result);
  AddVerb(app, "retry", "Open a failed job again; what is done stays done", &Stub::RetryJob, globals, result);
  AddVerb(app, "kill", "Stop a job at once, without a last checkpoint (see cancel)", &Stub::KillJob, globals, result);
  struct Flags {
    std::string id;
    int priority = 0;
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* command = app.add_subcommand("priority", "Change a job's priority");
  command->add_option("JOB", flags->id, "id of a job, or the beginning of one")->required();
  command->add_option("PRIORITY", flags->priority, "-1000 to 1000, the higher first")->required()->check(CLI::Range(-1000, 1000));
  command->callback([flags, &globals, &result] { result = SetPriority(flags->id, flags->priority, globals); });
}

}  // namespace refinery::client
