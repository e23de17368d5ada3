// refinery: the command-line client.

#include <signal.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <cstdlib>

#include "client/commands/commands.h"
#include "client/exit_code.h"
#include "common/logging.h"
#include "common/status.h"
#include "common/yaml_message.h"

namespace {

using refinery::client::Globals;

std::filesystem::path DefaultDataFolder() {
  const char* home = std::getenv("HOME");
  return std::filesystem::path(home == nullptr ? "." : home) / ".cache/refinery/data";
}

constexpr char kFooter[] =
    "Exit codes: 0 success; 1 the job failed, or an internal error; 2 wrong input (recipe, file, model, flag) or a\n"
    "coordinator that does not answer; 3 the job was cancelled; 130 detached by Ctrl-C, the job goes on.\n"
    "Standard output carries data only; progress and remarks go to standard error. NO_COLOR is honoured.";

void AddSecurity(CLI::App& app, Globals& globals) {
  refinery::ChannelSecurity& security = globals.security;
  app.add_option("--token-file", security.token_file, "file with the token of an admin")->envname("REFINERY_TOKEN_FILE");
  app.add_option("--tls-authority", security.tls.authority, "PEM file that signed the coordinator's certificate: use TLS")
      ->envname("REFINERY_TLS_AUTHORITY");
  app.add_option("--tls-certificate", security.tls.certificate, "PEM file: our own certificate, for mutual TLS")
      ->envname("REFINERY_TLS_CERTIFICATE");
  app.add_option("--tls-key", security.tls.key, "PEM file: its key")->envname("REFINERY_TLS_KEY");
  app.add_option("--server-name", security.server_name, "name in the coordinator's certificate, if not the HOST that is dialled")
      ->envname("REFINERY_SERVER_NAME");
}

void AddCommands(CLI::App& app, Globals& globals, refinery::client::Result& result) {
  using namespace refinery::client;   // NOLINT(google-build-using-namespace): the list of commands and nothing else
  AddRun(app, globals, result);
  AddSubmit(app, globals, result);
  AddPlan(app, globals, result);
  AddWatch(app, globals, result);
  AddList(app, globals, result);
  AddDescribe(app, globals, result);
  AddLogs(app, globals, result);
  AddCancel(app, globals, result);
  AddChanges(app, globals, result);
  AddWhy(app, globals, result);
  AddDiff(app, globals, result);
  AddFetch(app, globals, result);
  AddReport(app, globals, result);
  AddWorker(app, globals, result);
  AddAdmin(app, globals, result);
  AddDoctor(app, globals, result);
  AddChat(app, globals, result);
  AddData(app, globals, result);
  AddEval(app, globals, result);
  AddLint(app, globals, result);
  AddVersion(app, globals, result);
  AddCompletion(app, globals, result);
}

// The command that was named, down to its own commands: "refinery admin backup".
std::string NameOf(const CLI::App*& app) {
  std::string name = app->get_name();
  for (std::vector<CLI::App*> named = app->get_subcommands(); !named.empty(); named = app->get_subcommands()) {
    app = named[0];
    name += " " + app->get_name();
  }
  return name;
}

// One sentence for a command line that was not understood: the word that nobody knows first, since what is missing often follows from it.
std::string WrongUse(const CLI::App& program, const CLI::ParseError& error) {
  const CLI::App* app = &program;
  const std::string name = NameOf(app);
  const std::string help = refinery::Join(" See ", name, " --help");
  std::vector<std::string> commands, flags;
  for (const CLI::App* command : app->get_subcommands(nullptr)) commands.push_back(command->get_name());
  for (const CLI::App* of : {app, &program}) {
    for (const CLI::Option* option : of->get_options()) {
      for (const std::string& flag : option->get_lnames()) flags.push_back("--" + flag);
    }
  }
  const auto unknown = [&](const char* what, const std::string& word, const std::vector<std::string>& known) {
    const std::string near = refinery::Nearest(word.substr(0, word.find('=')), known);
    return refinery::Join(name, ": there is no ", what, " '", word, "'", near.empty() ? "." : "; did you mean '" + near + "'?", help);
  };
  for (const std::string& word : program.remaining(/*recurse=*/true)) {
    if (word.size() > 1 && word[0] == '-') return unknown("flag", word, flags);
    if (!commands.empty()) return unknown("command", word, commands);
    return refinery::Join(name, ": '", word, "' is one word too many.", help);
  }
  return refinery::Join(name, ": ", error.what(), ".", help);
}

}  // namespace

int main(int argc, char** argv) {
  signal(SIGPIPE, SIG_IGN);
  // gRPC's own messages about connections would stand between our one-sentence errors.
  setenv("GRPC_VERBOSITY", "NONE", /*overwrite=*/0);
  Globals globals;
  globals.data_folder = DefaultDataFolder();
  std::string format = "table";
  std::string data_folder;
  refinery::client::Result result = refinery::client::kOk;
  CLI::App app{"Refines large language models for small machines.", "refinery"};
  app.footer(kFooter);
  app.require_subcommand(1);
  app.fallthrough();
  app.set_version_flag("--version", "refinery " REFINERY_VERSION);
  app.add_option("--coordinator", globals.coordinator, "HOST:PORT of refineryd (default 127.0.0.1:7433)")
      ->envname("REFINERY_COORDINATOR");
  AddSecurity(app, globals);
  app.add_option("-o,--output-format", format, "json or table")->check(CLI::IsMember({"json", "table"}));
  app.add_option("--data-dir", data_folder, "folder of the pulled benchmarks (default ~/.cache/refinery/data)")
      ->envname("REFINERY_DATA_DIR");
  // Flags of the program may stand behind a command, and are read before its callback runs.
  app.parse_complete_callback([&] {
    globals.json = format == "json";
    const char* environment = std::getenv("REFINERY_COORDINATOR");   // set but empty counts as unset
    globals.coordinator_given = app.count("--coordinator") > 0 || (environment != nullptr && *environment != '\0');
    if (!data_folder.empty()) globals.data_folder = data_folder;
  });
  AddCommands(app, globals, result);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == static_cast<int>(CLI::ExitCodes::Success)) return app.exit(error);
    std::fprintf(stderr, "%s\n", WrongUse(app, error).c_str());
    return refinery::client::kWrongInput;
  }
  if (result.ok()) return *result;
  std::fprintf(stderr, "refinery: %s\n", refinery::Message(result.status()).c_str());
  return refinery::client::ExitCodeOf(result.status());
}
