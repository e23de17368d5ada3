// refinery-task: runs exactly one task in its own process and exits. The worker agent starts it; by hand it is for debugging
// and benchmarks:
//
//   refinery-task --spec spec.json --inputs DIR --outputs DIR
//
// Standard output carries one TaskEvent (JSON) a line, standard error the log. Exit codes: 0 done, 1 the task failed (the last
// event says why), 2 wrong usage.

#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>

#include "common/files.h"
#include "worker/task/data/table.h"
#include "worker/task/eval_command.h"
#include "worker/task/chat.h"
#include "worker/task/inspect.h"
#include "worker/task/lint_command.h"
#include "worker/task/runtime/device.h"
#include "worker/task/start.h"
#include "worker/task/tasks.h"

namespace {

// The agent's death must end its tasks: the kernel sends SIGKILL when the parent goes.
void DieWithParent(int parent_pid) {
  if (parent_pid <= 0) return;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != parent_pid) std::exit(1);  // it died before prctl
}

// Reading a part of a mapped file that someone cut off meanwhile ends a program by SIGBUS: the log should say what that means.
void OnBusError(int) {
  constexpr char kText[] = "refinery-task: a file that it reads became shorter (SIGBUS); leave model files alone while they are in use\n";
  (void)!::write(STDERR_FILENO, kText, sizeof(kText) - 1);
  ::raise(SIGBUS);   // SA_RESETHAND: now it ends the program, and the agent sees the signal
}

void ExplainBusErrors() {
  struct sigaction action {};
  action.sa_handler = OnBusError;
  action.sa_flags = static_cast<int>(SA_RESETHAND | SA_NODEFER);
  ::sigaction(SIGBUS, &action, nullptr);
}

int Fail(const absl::Status& status) {
  std::fprintf(stderr, "refinery-task: %s\n", refinery::Message(status).c_str());
  return 2;
}

// The flags of `refinery eval`; the client hands them on as they are.
CLI::App* AddEval(CLI::App& app, refinery::task::EvalOptions& eval) {
  CLI::App* command = app.add_subcommand("eval", "scores a model on benchmarks and task files");
  command->add_option("--model", eval.model, "Hugging Face folder (float or GPTQ) or GGUF file")->required();
  command->add_option("--adapter", eval.adapters, "PEFT adapter folder to merge; may stand several times");
  command->add_option("--compare", eval.compare, "a second model, scored on the same items and compared");
  command->add_option("--compare-adapter", eval.compare_adapters, "PEFT adapter folder of the second model");
  command->add_option("--tasks", eval.tasks, "names or task files (*.yaml), separated by commas")->delimiter(',')->required();
  command->add_option("--shots", eval.shots, "solved examples before each question")->check(CLI::Range(0, 100));
  command->add_option("--limit", eval.limit, "only the first N items of each task")->check(CLI::NonNegativeNumber);
  command->add_option("--data", eval.data, "folder of the pulled benchmarks");
  command->add_option("--split", eval.split, "score this split instead of the official one");
  command->add_option("--pool", eval.pool, "draw the shots from this split instead of the official one");
  command->add_option("--dtype", eval.dtype, "float32 or bfloat16")->check(CLI::IsMember({"float32", "bfloat16"}));
  command->add_option("--threads", eval.threads, "threads (default: all cores)")->check(CLI::NonNegativeNumber);
  command->add_option("--max-length", eval.max_length, "tokens of input, and of a perplexity window (default: the model's)");
  command->add_flag("--chat-template", eval.chat_template, "put prompts through the model's chat template");
  command->add_flag("--single-turn", eval.single_turn, "with --chat-template: shots in one user message");
  command->add_option("--system", eval.system, "instruction before every prompt");
  command->add_option("--harness-version", eval.harness_version, "release of lm-evaluation-harness whose BOS rule holds");
  command->add_option("--items", eval.items, "folder for one JSONL file a task with every item's scores");
  command->add_option("--output", eval.output, "text or json")->check(CLI::IsMember({"text", "json"}));
  command->add_option("--cache", eval.cache, "the worker's cache (default ~/.cache/refinery)");
  return command;
}

// The flags of `refinery chat`; the client hands them on as they are.
CLI::App* AddChat(CLI::App& app, refinery::task::ChatOptions& chat) {
  CLI::App* command = app.add_subcommand("chat", "a conversation with a model in the terminal, or one answer in a pipe");
  command->add_option("--model", chat.model, "Hugging Face folder (float or GPTQ) or GGUF file")->required();
  command->add_option("--adapter", chat.adapters, "PEFT adapter folder to merge; may stand several times");
  command->add_option("--dtype", chat.dtype, "float32 or bfloat16")->check(CLI::IsMember({"float32", "bfloat16"}));
  command->add_option("--threads", chat.threads, "threads (default: all cores)")->check(CLI::NonNegativeNumber);
  command->add_option("--system", chat.system, "system prompt");
  command->add_option("--prompt", chat.prompt, "answer this and leave");
  command->add_option("--json-schema", chat.json_schema, "file; answers are JSON that fits this schema");
  command->add_option("--temperature", chat.temperature, "0 = always the likeliest token");
  command->add_option("--top-p", chat.top_p, "draw from the likeliest tokens that reach this probability");
  command->add_option("--top-k", chat.top_k, "draw from this many tokens; 0 = all");
  command->add_option("--min-p", chat.min_p, "draw from tokens at least this times as likely as the likeliest");
  command->add_option("--repetition-penalty", chat.repetition_penalty, "> 1 makes what was said less likely");
  command->add_option("--presence-penalty", chat.presence_penalty, "subtracted from logits of tokens in the answer");
  command->add_option("--frequency-penalty", chat.frequency_penalty, "the same, times their number");
  command->add_option("--seed", chat.seed, "the same seed gives the same answers");
  command->add_option("--max-new-tokens", chat.max_new_tokens, "of an answer")->check(CLI::PositiveNumber);
  command->add_option("--context", chat.context, "tokens of a conversation")->check(CLI::NonNegativeNumber);
  command->add_option("--memory", chat.memory_mib, "MiB for the key-value cache (default: no bound)")->check(CLI::NonNegativeNumber);
  command->add_flag("--verbose", chat.verbose, "tokens and times after each answer");
  command->add_option("--cache", chat.cache, "the worker's cache (default ~/.cache/refinery)");
  return command;
}

// The flags of `refinery lint`; the client hands them on as they are.
CLI::App* AddLint(CLI::App& app, refinery::task::LintOptions& lint) {
  CLI::App* command = app.add_subcommand("lint", "which programs will load a model quantized so");
  command->add_option("--model", lint.model, "Hugging Face folder or GGUF file")->required();
  command->add_option("--bits", lint.bits, "width of the codes: 2, 3, 4 or 8");
  command->add_option("--group-size", lint.group_size, "-1: one group a row");
  command->add_option("--grid", lint.grid, "full_range, symmetric or asymmetric");
  command->add_option("--order", lint.order, "groups, natural or classic");
  command->add_option("--mixed", lint.mixed, "further widths of single layers")->delimiter(',');
  command->add_flag("--head", lint.head, "an untied lm_head is quantized too");
  command->add_option("--formats", lint.formats, "of gptq,gptq_v2,compressed_tensors,gguf")->delimiter(',');
  command->add_option("--output", lint.output, "text or json")->check(CLI::IsMember({"text", "json"}));
  return command;
}

struct ConvertOptions {
  std::vector<std::string> inputs, columns;
  std::string output;
};

// `refinery data pull` reads Arrow and Parquet by this: the client has no reader of its own.
CLI::App* AddConvertTable(CLI::App& app, ConvertOptions& convert) {
  CLI::App* command = app.add_subcommand("convert-table", "turns data files into JSON lines; prints how many rows");
  command->add_option("FILE", convert.inputs, "Parquet, Arrow, CSV, JSON (a list) or JSONL; their rows follow one another")->required();
  command->add_option("--output", convert.output, "the JSONL file to write")->required();
  command->add_option("--columns", convert.columns, "only these columns, separated by commas")->delimiter(',');
  return command;
}

int ConvertTable(const ConvertOptions& convert) {
  std::vector<std::filesystem::path> inputs(convert.inputs.begin(), convert.inputs.end());
  absl::StatusOr<size_t> rows = refinery::data::ConvertTables(inputs, convert.columns, convert.output);
  if (!rows.ok()) return Fail(rows.status());
  std::printf("%zu\n", *rows);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  refinery::runtime::KeepFreedPages();
  ExplainBusErrors();
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
  look->add_option("--adapter", inspect.adapters, "PEFT adapter folder; several are stacked");
  look->add_option("--dtype", inspect.dtype, "float32 or bfloat16")->check(CLI::IsMember({"float32", "bfloat16"}));
  look->add_option("--prompts", inspect.prompts, "JSON list of prompts (strings, or lists of token ids)");
  look->add_option("--max-new-tokens", inspect.max_new_tokens, "greedy tokens per prompt");
  look->add_option("--output", inspect.output, "folder: tokens.json and logits.safetensors");
  look->add_flag("--memory", inspect.memory, "prints the size of the weights and the peak memory of loading them");
  look->add_option("--cache", inspect.cache, "the worker's cache (default ~/.cache/refinery)");
  refinery::task::EvalOptions eval;
  CLI::App* score = AddEval(app, eval);
  refinery::task::ChatOptions chat;
  CLI::App* talk = AddChat(app, chat);
  refinery::task::LintOptions lint;
  CLI::App* check = AddLint(app, lint);
  ConvertOptions convert;
  CLI::App* table = AddConvertTable(app, convert);
  CLI11_PARSE(app, argc, argv);
  DieWithParent(parent_pid);
  if (score->parsed()) {
    if (eval.data.empty()) eval.data = refinery::task::CacheFolder(eval.cache) + "/data";
    absl::Status status = refinery::task::RunEvalCommand(eval);
    if (status.ok()) return 0;
    Fail(status);
    return status.code() == absl::StatusCode::kInternal ? 1 : 2;
  }
  if (talk->parsed()) {
    int code = 0;
    absl::Status status = refinery::task::Guarded([&]() -> absl::Status {
      RF_ASSIGN_OR_RETURN(code, refinery::task::Chat(chat));
      return absl::OkStatus();
    });
    return status.ok() ? code : Fail(status);
  }
  if (check->parsed()) {
    absl::StatusOr<bool> fits = refinery::task::RunLintCommand(lint);
    if (!fits.ok()) return Fail(fits.status());
    return *fits ? 0 : 2;
  }
  if (table->parsed()) return ConvertTable(convert);
  if (look->parsed()) {
    if (!inspect.memory && inspect.prompts.empty()) return Fail(refinery::InvalidArgument("inspect needs --prompts or --memory"));
    if (inspect.prompts.empty() != inspect.output.empty())
      return Fail(refinery::InvalidArgument("inspect takes --prompts and --output together"));
    absl::Status status = refinery::task::Inspect(inspect);
    return status.ok() ? 0 : Fail(status);
  }
  if (start.spec.empty() || start.inputs.empty() || start.outputs.empty())
    return Fail(refinery::InvalidArgument("--spec, --inputs and --outputs are needed (see --help)"));
  absl::StatusOr<bool> done = refinery::task::Start(start);
  if (!done.ok()) return Fail(done.status());
  return *done ? 0 : 1;
}
