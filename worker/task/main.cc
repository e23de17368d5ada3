// refinery-task: runs exactly one task in its own process and exits. The worker agent starts it; by hand it is for debugging
// and benchmarks:
//
//   refinery-task --spec spec.json --inputs DIR --outputs DIR
//
// Standard output carries one TaskEvent (JSON) a line, standard error the log. Exit codes: 0 done, 1 the task failed (the last
// event says why), 2 wrong usage.

#include <malloc.h>
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>

#include "common/files.h"
#include "worker/task/inspect.h"
#include "worker/task/start.h"

namespace {

// The agent's death must end its tasks: the kernel sends SIGKILL when the parent goes.
void DieWithParent(int parent_pid) {
  if (parent_pid <= 0) return;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent_pid) std::exit(1);  // it died before prctl
}

// Tensors of a few megabytes come and go at every step: keep their pages instead of asking the kernel for zeroed ones each time
// (about a tenth of a training step).
void KeepFreedPages() {
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  mallopt(M_TOP_PAD, 64 << 20);
}

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "refinery-task: %s\n", refinery::Message(status).c_str());
  return 2;
}

}  // namespace

int main(int argc, char** argv) {
  KeepFreedPages();
  CLI::App app{"Runs one Refinery task."};
  app.set_version_flag("--version", REFINERY_VERSION);
  refinery::task::StartOptions start;
  refinery::task::InspectOptions inspect;
  int parent_pid = 0;
  app.add_option("--spec", start.spec, "the task: JSON form of refinery.v1.TaskSpec");
  app.add_option("--inputs", start.inputs, "folder with one folder per input");
  app.add_option("--outputs", start.outputs, "folder to write; must be empty or missing");
  app.add_option("--checkpoints", start.checkpoints, "folder for checkpoints; none are written without it");
  app.add_option("--resume", start.resume, "checkpoint folder to resume from");
  app.add_option("--cache", start.cache, "the worker's cache (default ~/.cache/refinery)");
  app.add_option("--parent-pid", parent_pid, "die when this process, the parent, dies");
  CLI::App* look = app.add_subcommand("inspect", "runs a model on given token ids: greedy continuation and logits");
  look->add_option("--model", inspect.model, "Hugging Face folder (bf16 or GPTQ) or GGUF file")->required();
  look->add_option("--adapter", inspect.adapter, "PEFT adapter folder");
  look->add_option("--dtype", inspect.dtype, "float32 or bfloat16")->check(CLI::IsMember({"float32", "bfloat16"}));
  look->add_option("--prompts", inspect.prompts, "JSON list of prompts (strings, or lists of token ids)")->required();
  look->add_option("--max-new-tokens", inspect.max_new_tokens, "greedy tokens per prompt");
  look->add_option("--output", inspect.output, "folder: tokens.json and logits.safetensors")->required();
  look->add_option("--cache", inspect.cache, "the worker's cache (default ~/.cache/refinery)");
  CLI11_PARSE(app, argc, argv);
  DieWithParent(parent_pid);
  if (look->parsed()) {
    absl::Status status = refinery::task::Inspect(inspect);
    return status.ok() ? 0 : Fail(status);
  }
  if (start.spec.empty() || start.inputs.empty() || start.outputs.empty())
    return Fail(refinery::InvalidArgument("--spec, --inputs and --outputs are needed (see --help)"));
  absl::StatusOr<bool> done = refinery::task::Start(start);
  if (!done.ok()) return Fail(done.status());
  return *done ? 0 : 1;
}
