// refinery eval: scores a model on this machine, without a job. The work is done by refinery-task beside this program, which
// this process becomes: its output, its errors, its exit code and Ctrl-C are then those of the command.

#include "client/commands/commands.h"
#include "client/exit_code.h"
#include "client/task_program.h"

namespace refinery::client {
namespace {

struct EvalFlags {
  std::string model, compare, tasks, split, pool, dtype, system, harness_version, items, cache, task_program, data, output;
  std::vector<std::string> adapters, compare_adapters;
  int shots = -1, limit = 0, threads = 0, max_length = 0;
  bool chat_template = false, single_turn = false;
};

// Arguments for refinery-task: only the flags that were given.
std::vector<std::string> Arguments(const EvalFlags& flags, const Globals& globals) {
  std::vector<std::string> arguments = {"eval", "--model", flags.model, "--tasks", flags.tasks};
  const auto text = [&](const char* flag, const std::string& value) {
    if (!value.empty()) arguments.insert(arguments.end(), {flag, value});
  };
  const auto number = [&](const char* flag, int value) {
    if (value != 0) arguments.insert(arguments.end(), {flag, std::to_string(value)});
  };
  for (const std::string& adapter : flags.adapters) text("--adapter", adapter);
  for (const std::string& adapter : flags.compare_adapters) text("--compare-adapter", adapter);
  text("--compare", flags.compare);
  text("--split", flags.split);
  text("--pool", flags.pool);
  text("--dtype", flags.dtype);
  text("--system", flags.system);
  text("--harness-version", flags.harness_version);
  text("--items", flags.items);
  text("--cache", flags.cache);
  text("--data", flags.data.empty() ? globals.data_folder.string() : flags.data);
  text("--output", flags.output.empty() && globals.json ? "json" : flags.output);
  if (flags.shots >= 0) arguments.insert(arguments.end(), {"--shots", std::to_string(flags.shots)});
  number("--limit", flags.limit);
  number("--threads", flags.threads);
  number("--max-length", flags.max_length);
  if (flags.chat_template) arguments.push_back("--chat-template");
  if (flags.single_turn) arguments.push_back("--single-turn");
  return arguments;
}

}  // namespace

void AddEval(CLI::App& app, Globals& globals, Result& result) {
  auto flags = std::make_shared<EvalFlags>();
  CLI::App* command = app.add_subcommand("eval", "Score a model on benchmarks or task files, here and now, without a job");
  command->add_option("MODEL", flags->model, "Hugging Face folder (float or GPTQ) or GGUF file")->required();
  command->add_option("--tasks", flags->tasks, "arc_easy,mmlu,wikitext,my_task.yaml,...")->required();
  command->add_option("--adapter", flags->adapters, "PEFT adapter folder to merge; may stand several times");
  command->add_option("--compare", flags->compare, "a second model on the same items: McNemar's test and intervals");
  command->add_option("--compare-adapter", flags->compare_adapters, "PEFT adapter folder of the second model");
  command->add_option("--shots", flags->shots, "solved examples before each question (default 0, or what a task file says)")->check(CLI::Range(0, 100));
  command->add_option("--limit", flags->limit, "only the first N items of each task")->check(CLI::NonNegativeNumber);
  command->add_option("--data", flags->data, "folder of the pulled benchmarks (default: that of --data-dir)");
  command->add_option("--split", flags->split, "score this split instead of the official one");
  command->add_option("--pool", flags->pool, "draw the shots from this split instead of the official one");
  command->add_option("--dtype", flags->dtype, "float32 or bfloat16 (default)")->check(CLI::IsMember({"float32", "bfloat16"}));
  command->add_option("--threads", flags->threads, "threads (default: all cores)")->check(CLI::NonNegativeNumber);
  command->add_option("--max-length", flags->max_length, "tokens of input, and of a perplexity window (default: the model's)")
      ->check(CLI::NonNegativeNumber);
  command->add_flag("--chat-template", flags->chat_template, "put prompts through the model's chat template");
  command->add_flag("--single-turn", flags->single_turn, "with --chat-template: the shots in one user message");
  command->add_option("--system", flags->system, "instruction before every prompt");
  command->add_option("--harness-version", flags->harness_version,
                      "release of lm-evaluation-harness whose BOS rule holds (default 0.4.13)");
  command->add_option("--items", flags->items, "folder for one JSONL file a task with every item's scores");
  command->add_option("--output", flags->output, "text or json")->check(CLI::IsMember({"text", "json"}));
  command->add_option("--cache", flags->cache, "cache of imported models (default ~/.cache/refinery)");
  command->add_option("--task-program", flags->task_program, "refinery-task to use (default: beside this program)");
  command->callback([flags, &globals, &result] { result = BecomeTaskProgram(flags->task_program, Arguments(*flags, globals)); });
}

}  // namespace refinery::client
