// refinery completion: scripts for shells, generated from the commands and flags themselves.

#include <iostream>
#include <sstream>

#include "client/commands/commands.h"
#include "client/exit_code.h"

namespace refinery::client {
namespace {

std::string Words(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : " ") + word;
  return text;
}

std::vector<std::string> Commands(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) names.push_back(command->get_name());
  return names;
}

std::vector<std::string> Flags(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::Option* option : app.get_options()) {
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
    for (const std::string& name : option->get_snames()) names.push_back("-" + name);
  }
  return names;
}

// The function both bash and zsh (through bashcompinit) use: commands first, then flags and files.
std::string Bash(const CLI::App& app) {
  std::ostringstream out;
  out << "_refinery() {\n"
         "  local current=${COMP_WORDS[COMP_CWORD]} command= sub= word\n"
         "  for word in \"${COMP_WORDS[@]:1:COMP_CWORD-1}\"; do\n"
         "    [[ $word == -* ]] && continue\n"
         "    if [[ -z $command ]]; then command=$word; else sub=$word; fi\n"
         "  done\n"
         "  local words=\n"
         "  case $command in\n"
         "    '') words='" << Words(Commands(app)) << " " << Words(Flags(app)) << "' ;;\n";
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
    out << "    " << command->get_name() << ") words='" << Words(Commands(*command));
    out << " " << Words(Flags(*command)) << " " << Words(Flags(app)) << "'";
    if (command->get_name() == "completion") out << "; words=\"bash zsh fish $words\"";
    out << " ;;\n";
  }
  out << "  esac\n"
         "  COMPREPLY=($(compgen -W \"$words\" -- \"$current\"))\n"
         "  [[ -n $command && $current != -* ]] && COMPREPLY+=($(compgen -f -- \"$current\"))\n"
         "}\n"
         "complete -o filenames -F _refinery refinery\n";
  return out.str();
}

std::string Quoted(const std::string& text) {
  std::string out = "'";
  for (char c : text) out += c == '\'' ? std::string("\\'") : std::string(1, c);
  return out + "'";
}

std::string Fish(const CLI::App& app) {
  std::ostringstream out;
  std::string names = Words(Commands(app));
  auto flags = [&](const CLI::App& of, const std::string& condition) {
    for (const CLI::Option* option : of.get_options()) {
      if (option->get_lnames().empty() && option->get_snames().empty()) continue;
      out << "complete -c refinery -n " << Quoted(condition);
      for (const std::string& name : option->get_lnames()) out << " -l " << name;
      for (const std::string& name : option->get_snames()) out << " -s " << name;
      out << " -d " << Quoted(option->get_description()) << "\n";
    }
  };
  flags(app, "true");
  for (const CLI::App* command : app.get_subcommands([](const CLI::App*) { return true; })) {
    out << "complete -c refinery -f -n 'not __fish_seen_subcommand_from " << names << "' -a " << command->get_name()
        << " -d " << Quoted(command->get_description()) << "\n";
    std::string inside = "__fish_seen_subcommand_from " + command->get_name();
    flags(*command, inside);
    for (const std::string& sub : Commands(*command))
      out << "complete -c refinery -f -n " << Quoted(inside) << " -a " << sub << "\n";
  }
  return out.str();
}

}  // namespace

void AddCompletion(CLI::App& app, Globals&, Result& result) {
  auto shell = std::make_shared<std::string>();
  CLI::App* command = app.add_subcommand("completion", "Print a completion script: eval \"$(refinery completion bash)\"");
  command->add_option("SHELL", *shell, "bash, zsh or fish")->required()->check(CLI::IsMember({"bash", "zsh", "fish"}));
  command->callback([shell, &app, &result] {
    if (*shell == "zsh") std::cout << "autoload -U +X bashcompinit && bashcompinit\n";
    std::cout << (*shell == "fish" ? Fish(app) : Bash(app));
    result = kOk;
  });
}

}  // namespace refinery::client
