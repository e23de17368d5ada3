#include "worker/task/start.h"

#include <cstdio>
#include <cstdlib>

#include "common/files.h"
#include "worker/task/runtime/device.h"
#include "worker/task/tasks.h"

namespace refinery::task {

std::string CacheFolder(const std::string& given) {
  if (!given.empty()) return given;
  const char* home = std::getenv("HOME");
  return Join(home == nullptr ? "/tmp" : home, "/.cache/refinery");
}

StatusOr<bool> Start(const StartOptions& options) {
  RF_ASSIGN_OR_RETURN(std::string json, ReadFile(options.spec, 64 << 20));
  RF_ASSIGN_OR_RETURN(TaskSpec spec, TaskSpecFromJson(json, options.spec));
  RF_RETURN_IF_ERROR(CreateFolders(options.outputs));
  if (!std::filesystem::is_empty(options.outputs))
    return InvalidArgument("--outputs ", options.outputs, " is not empty; give a new folder");
  InstallStopHandler();
  runtime::SetThreads(spec.threads);
  EventWriter events;
  TaskContext context{.job = spec.job,
                      .path = spec.path,
                      .seed = spec.seed,
                      .inputs = options.inputs,
                      .outputs = options.outputs,
                      .checkpoints = options.checkpoints,
                      .resume = options.resume,
                      .cache = CacheFolder(options.cache),
                      .events = events};
  std::fprintf(stderr, "task %s of job %s on %s\n", spec.path.c_str(), spec.job.c_str(),
               runtime::DescribeDevice(runtime::DefaultDevice()).c_str());
  Status status = RunTask(spec, context);
  if (!status.ok()) std::fprintf(stderr, "failed: %s\n", Message(status).c_str());
  return status.ok();
}

}  // namespace refinery::task
