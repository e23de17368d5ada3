// refinery why, diff.

#include <iostream>

#include "client/commands/commands.h"
#include "client/exit_code.h"
#include "client/render/json.h"
#include "client/render/why_text.h"
#include "common/grpc_status.h"

namespace refinery::client {
namespace {

// The job's events up to now; none when the coordinator has forgotten them.
std::vector<v1::Event> EventsOf(Connection& connection, const v1::Job& job) {
  std::vector<v1::Event> events;
  grpc::ClientContext context;
  SetDeadline(&context);
  v1::WatchJobRequest request;
  request.set_id(job.id());
  auto stream = connection.jobs->WatchJob(&context, request);
  v1::WatchJobResponse response;
  while (stream->Read(&response)) {
    if (response.has_event()) events.push_back(std::move(*response.mutable_event()));
    if (response.has_heartbeat() || (!events.empty() && events.back().seq() >= job.as_of_seq())) break;
  }
  context.TryCancel();
  return events;
}

StatusOr<int> Why(const std::string& id, const Globals& globals) {
  RF_ASSIGN_OR_RETURN(Connection connection, Connect(globals));
  RF_ASSIGN_OR_RETURN(const v1::Job job, GetJob(connection, id));
  grpc::ClientContext workers_context, version_context;
  SetDeadline(&workers_context);
  SetDeadline(&version_context);
  v1::ListWorkersResponse workers;
  RF_RETURN_IF_ERROR(FromGrpc(connection.jobs->ListWorkers(&workers_context, v1::ListWorkersRequest(), &workers)));
  v1::VersionInfo version;  // its clock made the events' times
  RF_RETURN_IF_ERROR(FromGrpc(connection.jobs->GetVersion(&version_context, v1::GetVersionRequest(), &version)));
  std::cout << WhyText(job, EventsOf(connection, job), workers, version.time_ms());
  return kOk;
}

StatusOr<int> Diff(const std::string& before, const std::string& after, const Globals& globals) {
  RF_ASSIGN_OR_RETURN(Connection connection, Connect(globals));
  grpc::ClientContext context;
  SetDeadline(&context);
  v1::DiffJobsRequest request;
  request.set_before(before);
  request.set_after(after);
  v1::JobDiff diff;
  RF_RETURN_IF_ERROR(FromGrpc(connection.jobs->DiffJobs(&context, request, &diff)));
  std::cout << (globals.json ? ToJson(diff) : DiffText(diff));
  return kOk;
}

}  // namespace

void AddWhy(CLI::App& app, Globals& globals, Result& result) {
  auto id = std::make_shared<std::string>();
  CLI::App* command = app.add_subcommand("why", "Say in one paragraph why a job waits, is slow, or failed");
  command->add_option("JOB", *id, "id of a job, or the beginning of one")->required();
  command->callback([id, &globals, &result] { result = Why(*id, globals); });
}

void AddDiff(CLI::App& app, Globals& globals, Result& result) {
  auto jobs = std::make_shared<std::pair<std::string, std::string>>();
  CLI::App* command = app.add_subcommand("diff", "Say which tasks of a job ran again, compared with an earlier job, and why");
  command->add_option("BEFORE", jobs->first, "the earlier job")->required();
  command->add_option("AFTER", jobs->second, "the later job")->required();
  command->callback([jobs, &globals, &result] { result = Diff(jobs->first, jobs->second, globals); });
}

}  // namespace refinery::client
