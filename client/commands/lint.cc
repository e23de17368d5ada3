// refinery lint: which programs will load a quantized model, before any work. refinery-task beside this program answers; this
// process becomes it.

#include "client/commands/commands.h"
#include "client/task_program.h"

namespace refinery::client {
namespace {

struct LintFlags {
  std::string model, grid, order, formats, mixed, task_program;
  int bits = 4, group_size = 64;
  bool head = false;
};

std::vector<std::string> Arguments(const LintFlags& flags, bool json) {
  std::vector<std::string> arguments = {"lint", "--model", flags.model, "--bits", std::to_string(flags.bits), "--group-size",
                                        std::to_string(flags.group_size)};
  const auto text = [&](const char* flag, const std::string& value) {
    if (!value.empty()) arguments.insert(arguments.end(), {flag, value});
  };
  text("--grid", flags.grid);
  text("--order", flags.order);
  text("--formats", flags.formats);
  text("--mixed", flags.mixed);
  if (flags.head) arguments.push_back("--head");
  if (json) text("--output", "json");
  return arguments;
}

}  // namespace

void AddLint(CLI::App& app, Globals& globals, Result& result) {
  auto flags = std::make_shared<LintFlags>();
  CLI::App* command = app.add_subcommand("lint", "Say which programs will load a model quantized so, and the nearest settings that they take");
  command->add_option("MODEL", flags->model, "Hugging Face folder or GGUF file")->required();
  command->add_option("--bits", flags->bits, "2, 3, 4 or 8 (default 4)")->check(CLI::IsMember({2, 3, 4, 8}));
  command->add_option("--group-size", flags->group_size, "weights along the input that share a scale; -1: one group a row (default 64)");
  command->add_option("--grid", flags->grid, "full_range (default), symmetric or asymmetric")
      ->check(CLI::IsMember({"full_range", "symmetric", "asymmetric"}));
  command->add_option("--order", flags->order, "groups (default), natural or classic")->check(CLI::IsMember({"groups", "natural", "classic"}));
  command->add_option("--mixed", flags->mixed, "further widths that single layers may get: 3,8");
  command->add_flag("--head", flags->head, "an untied lm_head is quantized too");
  command->add_option("--formats", flags->formats, "of gptq,gptq_v2,compressed_tensors,gguf (default all)");
  command->add_option("--task-program", flags->task_program, "refinery-task to use (default: beside this program)");
  command->callback([flags, &globals, &result] { result = BecomeTaskProgram(flags->task_program, Arguments(*flags, globals.json)); });
}

}  // namespace refinery::client
