// refinery list, describe, cancel, watch, logs, fetch, report.

#include <unistd.h>

#include <iostream>
#include <thread>

#include "client/commands/commands.h"
#include "client/commands/result.h"
#include "client/exit_code.h"
#include "client/follow.h"
#include "client/interrupt.h"
#include "client/recipe_input.h"
#include "client/render/job_text.h"
#include "client/render/json.h"
#include "client/render/terminal.h"
#include "common/artifact_client.h"
#include "common/grpc_status.h"

namespace refinery::client {
namespace {

constexpr uint64_t kMaxReportBytes = 16 << 20;

struct ListFlags {
  std::string filter, order_by, tenant;
};

StatusOr<int> List(const ListFlags& flags, const Globals& globals) {
  RF_ASSIGN_OR_RETURN(Connection connection, Connect(globals));
  v1::ListJobsResponse all;
  v1::ListJobsRequest request;
  request.set_filter(flags.filter);
  request.set_order_by(flags.order_by);
  request.set_tenant(flags.tenant);
  do {
    grpc::ClientContext context;
    SetDeadline(&context);
    v1::ListJobsResponse page;
    RF_RETURN_IF_ERROR(FromGrpc(connection.jobs->ListJobs(&context, request, &page)));
    all.mutable_jobs()->MergeFrom(page.jobs());
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty());
  std::cout << (globals.json ? ToJson(all) : JobTable(all));
  return kOk;
}

StatusOr<int> Describe(const std::string& id, const Globals& globals) {
  RF_ASSIGN_OR_RETURN(Connection connection, Connect(globals));
  RF_ASSIGN_OR_RETURN(v1::Job job, GetJob(connection, id));
  std::cout << (globals.json ? ToJson(job) : JobDescription(job));
  return kOk;
}

StatusOr<int> Cancel(const std::string& id, const std::string& reason, const Globals& globals) {
  RF_ASSIGN_OR_RETURN(Connection connection, Connect(globals));
  grpc::ClientContext context;
  SetDeadline(&context);
  v1::CancelJobRequest request;
  request.set_id(id);
  request.set_reason(reason);
  request.set_request_id(RandomRequestId());
  v1::Job job;
  RF_RETURN_IF_ERROR(FromGrpc(connection.jobs->CancelJob(&context, request, &job)));
  if (globals.json) std::cout << ToJson(job);
  else if (job.state() == v1::Job::SUCCEEDED || job.state() == v1::Job::FAILED)
    std::cerr << "job " << job.id() << " had ended before: it has " << StateName(job.state()) << "\n";
  else std::cerr << "job " << job.id() << " is " << StateName(job.state()) << "\n";
  return kOk;
}

StatusOr<int> Watch(const std::string& id, uint64_t after_seq, const Globals& globals) {
  Interrupt interrupt;
  RF_ASSIGN_OR_RETURN(Connection connection, Connect(globals));
  FollowOptions options;
  options.interrupt = &interrupt;
  options.json = globals.json;
  options.after_seq = after_seq;
  StatusOr<v1::Job> job = FollowJob(connection, id, options);
  if (job.status().code() == absl::StatusCode::kCancelled) {
    std::cerr << "\ndetached; the job goes on. To come back: refinery --coordinator " << globals.coordinator << " watch " << id
              << "\n";
    return kDetached;
  }
  if (!job.ok()) return job.status();
  if (job->state() != v1::Job::SUCCEEDED) {
    std::cerr << "refinery: " << FailureText(*job) << "\n";
  } else if (!globals.json) {
    RF_ASSIGN_OR_RETURN(std::string table, ReportTable(connection, *job));
    std::cout << table;
    std::cerr << "\nfetch the artifact with `refinery fetch " << job->id() << "`\n";
  }
  return ExitCodeOf(*job);
}

struct LogFlags {
  std::string id, task;
  bool follow = false;
};

StatusOr<int> Logs(const LogFlags& flags, const Globals& globals) {
  Interrupt interrupt;
  RF_ASSIGN_OR_RETURN(Connection connection, Connect(globals));
  grpc::ClientContext context;
  v1::TailLogsRequest request;
  request.set_id(flags.id);
  request.set_path(flags.task);
  request.set_follow(flags.follow);
  std::atomic<bool> done{false};
  std::thread canceller([&] {
    while (!done && !interrupt.raised()) std::this_thread::sleep_for(std::chrono::milliseconds(100));
    if (!done) context.TryCancel();
  });
  auto stream = connection.jobs->TailLogs(&context, request);
  v1::LogChunk chunk;
  std::string last;
  while (stream->Read(&chunk)) {
    if (globals.json) {
      std::cout << ToJson(chunk, JsonForm::kLine);
    } else {
      std::string now = Join(chunk.path(), " attempt ", chunk.attempt());
      if (now != last) std::cout << "== " << now << " ==\n";
      last = now;
      std::cout << (IsTerminal(STDOUT_FILENO) ? Printable(chunk.text()) : chunk.text());
    }
    std::cout << std::flush;
  }
  done = true;
  canceller.join();
  Status status = FromGrpc(stream->Finish());
  if (interrupt.raised()) return kDetached;
  if (!status.ok()) return status;
  return kOk;
}

StatusOr<int> Fetch(const std::string& id, const std::string& output, const Globals& globals) {
  RF_ASSIGN_OR_RETURN(Connection connection, Connect(globals));
  RF_ASSIGN_OR_RETURN(v1::Job job, GetJob(connection, id));
  std::filesystem::path folder = std::filesystem::absolute(output.empty() ? job.id() : output);
  RF_RETURN_IF_ERROR(FetchResult(connection, job, folder));
  if (globals.json) {
    std::cout << ToJson(job);
  } else {
    if (job.has_artifact()) std::cout << (folder / "artifact").string() << "\n";
    if (job.has_best()) std::cout << (folder / "best").string() << "\n";
    if (job.has_report()) std::cout << (folder / "report").string() << "\n";
  }
  return kOk;
}

StatusOr<int> Report(const std::string& id, bool table, const Globals& globals) {
  RF_ASSIGN_OR_RETURN(Connection connection, Connect(globals));
  RF_ASSIGN_OR_RETURN(v1::Job job, GetJob(connection, id));
  if (globals.json) {
    std::cout << ToJson(job);
    return kOk;
  }
  RF_ASSIGN_OR_RETURN(std::string text, ReportTable(connection, job));
  if (!table) {
    RF_ASSIGN_OR_RETURN(text, ArtifactClient(connection.channel)
                                  .ReadArtifactFile(job.report().digest(), "report.md", kMaxReportBytes));
  }
  std::cout << text;
  return kOk;
}

// A command whose only argument is a job.
template <typename Run>
CLI::App* AddJobCommand(CLI::App& app, const char* name, const char* help, Result& result, Run run) {
  auto id = std::make_shared<std::string>();
  CLI::App* command = app.add_subcommand(name, help);
  command->add_option("JOB", *id, "id of a job, or the beginning of one")->required();
  command->callback([id, run, &result] { result = run(*id); });
  return command;
}

}  // namespace

void AddList(CLI::App& app, Globals& globals, Result& result) {
  auto flags = std::make_shared<ListFlags>();
  CLI::App* command = app.add_subcommand("list", "List the jobs, newest first");
  command->add_option("--filter", flags->filter, "e.g. 'state = RUNNING AND owner : ann'");
  command->add_option("--order-by", flags->order_by, "e.g. 'priority desc, create_time_ms'");
  command->add_option("--tenant", flags->tenant, "only this tenant's");
  command->callback([flags, &globals, &result] { result = List(*flags, globals); });
}

void AddDescribe(CLI::App& app, Globals& globals, Result& result) {
  AddJobCommand(app, "describe", "Show one job: its tasks, trials, and what it waits for", result,
                [&globals](const std::string& id) { return Describe(id, globals); });
}

void AddCancel(CLI::App& app, Globals& globals, Result& result) {
  auto reason = std::make_shared<std::string>("cancelled by the user");
  AddJobCommand(app, "cancel", "Stop a job", result, [reason, &globals](const std::string& id) {
    return Cancel(id, *reason, globals);
  })->add_option("--reason", *reason, "shown in the job's description");
}

void AddWatch(CLI::App& app, Globals& globals, Result& result) {
  auto after_seq = std::make_shared<uint64_t>(0);
  AddJobCommand(app, "watch", "Follow a job to its end; Ctrl-C detaches, the job goes on", result,
                [after_seq, &globals](const std::string& id) { return Watch(id, *after_seq, globals); })
      ->add_option("--after-seq", *after_seq, "with -o json: print the events after this number");
}

void AddLogs(CLI::App& app, Globals& globals, Result& result) {
  auto flags = std::make_shared<LogFlags>();
  CLI::App* command = app.add_subcommand("logs", "Print the log of a job's tasks");
  command->add_option("JOB", flags->id, "id of a job, or the beginning of one")->required();
  command->add_option("--task", flags->task, "only this task, e.g. trial/0/replicate/1");
  command->add_flag("-f,--follow", flags->follow, "wait for more");
  command->callback([flags, &globals, &result] { result = Logs(*flags, globals); });
}

void AddFetch(CLI::App& app, Globals& globals, Result& result) {
  auto output = std::make_shared<std::string>();
  AddJobCommand(app, "fetch", "Download a job's artifact and report; resumes, checks every digest", result,
                [output, &globals](const std::string& id) { return Fetch(id, *output, globals); })
      ->add_option("--output", *output, "folder (default: ./<job>)");
}

void AddReport(CLI::App& app, Globals& globals, Result& result) {
  auto table = std::make_shared<bool>(false);
  AddJobCommand(app, "report", "Print a job's report (Markdown)", result,
                [table, &globals](const std::string& id) { return Report(id, *table, globals); })
      ->add_flag("--table", *table, "the summary table only");
}

}  // namespace refinery::client
