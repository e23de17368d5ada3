// server/plan/plan.h
//
// Turns a recipe into the graph of tasks that a job runs. Pure: the same recipe and files give the same plan.

#pragma once

#include <map>
#include <string>
#include <vector>

#include "common/status.h"
#include "refinery/v1/recipe.pb.h"
#include "refinery/v1/task.pb.h"

namespace refinery::plan {

// Where an input of a task comes from.
struct Input {
  enum class Source {
    kFile,       // `from` is a role in JobCreated.files: "seeds", "benchmark/arc_easy"
    kTask,       // `from` is the path of the task whose output it is
    kStudyBest,  // `from` is a selector of StudyFinished: "best", "best-muon", "best-adamw"; the input is that adapter
  };
  std::string name;  // folder under --inputs: "student", "adapter", "scored-0"
  Source source = Source::kTask;
  std::string from;
};

struct PlannedTask {
  std::string path;  // "import/student", "trial/0/replicate/1", "quantize/refined", "evaluate/student-gptq"
  v1::TaskKind kind = v1::TASK_KIND_UNSPECIFIED;
  std::vector<Input> inputs;
  v1::TaskSpec spec;  // params and seed; inputs are filled in when the task is leased; the settings of a train task
                      // are filled in when its trial is suggested
  int trial = -1;     // of train tasks
  int replicate = -1;
  std::vector<std::string> needs;  // paths that must be done first (also every train task, for kStudyBest inputs)
  std::string summary;             // one line for people
};

struct Plan {
  std::vector<PlannedTask> tasks;  // in an order in which they could run
  const PlannedTask* Find(const std::string& path) const;
};

// `recipe` has its defaults filled in and is checked (common/recipe.h). FAILED_PRECONDITION when a file role is
// missing.
StatusOr<Plan> MakePlan(const v1::Recipe& recipe, const std::map<std::string, std::string>& files);

// The graph as aligned text, one task a line with what it needs.
std::string PlanText(const Plan& plan);

// Identity of a task: digest of (kind, parameters, seed, input names and digests, code version). Equal identities give
// equal outputs, so a finished one is reused. The job id and the path are not part of it; for `evaluate` neither is the
// variant name; nor are threads, artifact sizes, the order of the inputs and the "checkpoint" that a train task resumes
// from. The seed counts only for kinds that draw random numbers (IsSeeded); the others have seed 0 in the plan.
std::string TaskDigest(const v1::TaskSpec& spec, const std::string& code_version);

// Kinds whose work draws random numbers: synthesize, critique, curate, teacher_logits, train, recover.
bool IsSeeded(v1::TaskKind kind);

// Whether a finished task of this kind may stand for another one with the same digest. Not import_model: it reads by
// reference, and what lies at the place may have changed.
bool IsReusable(v1::TaskKind kind);

}  // namespace refinery::plan
