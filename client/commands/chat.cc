// refinery chat: a conversation with a model on this machine. The work is done by refinery-task.

#include <map>

#include "client/commands/commands.h"
#include "client/task_program.h"

namespace refinery::client {
namespace {

struct Option {
  const char* name;
  const char* help;
  bool is_number = true;
};

constexpr Option kOptions[] = {
    {"--system", "system prompt", false},
    {"--prompt", "answer this and leave; so does `echo TEXT | refinery chat MODEL`", false},
    {"--json-schema", "file; answers are JSON that fits this schema", false},
    {"--temperature", "0 = always the likeliest token (default: the model's, or 0.7)"},
    {"--top-p", "draw from the likeliest tokens that reach this probability (default: the model's, or 0.95)"},
    {"--top-k", "draw from this many tokens; 0 = all"},
    {"--min-p", "draw from tokens at least this times as likely as the likeliest"},
    {"--repetition-penalty", "> 1 makes what was said less likely"},
    {"--presence-penalty", "-2 to 2; subtracted from the logits of tokens in the answer"},
    {"--frequency-penalty", "-2 to 2; the same, times their number"},
    {"--seed", "the same seed gives the same answers"},
    {"--max-new-tokens", "of an answer (default 1024)"},
    {"--context", "tokens of a conversation (default: what the model takes, up to 8192)"},
    {"--memory", "MiB for the key-value cache (default: no bound)"},
    {"--dtype", "bfloat16 (default) or float32", false},
    {"--threads", "threads (default: all cores)"},
    {"--cache", "the worker's cache (default ~/.cache/refinery)", false},
};

struct ChatFlags {
  std::string model, task_program;
  std::vector<std::string> adapters;
  std::map<std::string, std::string> values;
  bool verbose = false;
};

}  // namespace

void AddChat(CLI::App& app, Globals&, Result& result) {
  auto flags = std::make_shared<ChatFlags>();
  CLI::App* command = app.add_subcommand("chat", "Talk with a model here: in the terminal, or one answer in a pipe");
  command->add_option("MODEL", flags->model, "Hugging Face folder (float or GPTQ) or GGUF file")->required();
  command->add_option("--adapter", flags->adapters, "PEFT adapter folder to merge; may stand several times");
  for (const Option& option : kOptions) {
    CLI::Option* added = command->add_option(option.name, flags->values[option.name], option.help);
    if (option.is_number) added->check(CLI::Number);
  }
  command->add_flag("--verbose", flags->verbose, "tokens and times after each answer, to standard error");
  command->add_option("--task-program", flags->task_program, "refinery-task to use (default: beside this program)");
  command->callback([flags, command, &result] {
    std::vector<std::string> arguments = {"chat", "--model=" + flags->model};
    for (const std::string& adapter : flags->adapters) arguments.push_back("--adapter=" + adapter);
    for (const auto& [name, value] : flags->values) {
      if (command->count(name) > 0) arguments.push_back(name + "=" + value);
    }
    if (flags->verbose) arguments.push_back("--verbose");
    result = BecomeTaskProgram(flags->task_program, std::move(arguments));
  });
}

}  // namespace refinery::client
