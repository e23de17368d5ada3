// Tests of the `refinery` program as a user meets it: exit codes, one clear sentence on standard error, data on standard output.

#include <stdlib.h>

#include <filesystem>
#include <fstream>

#include "common/files.h"
#include "tests/support/run_program.h"
#include "tests/support/status_matchers.h"

namespace refinery {
namespace {

using ::testing::AllOf;
using ::testing::ContainsRegex;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;
using testing::Output;
using testing::RunProgram;

constexpr char kNobody[] = "127.0.0.1:1";   // nothing listens on port 1

class CommandLineTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "client-XXXXXX").string();
    folder_ = ::mkdtemp(name.data());
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  Output Refinery(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), REFINERY_BINARY_DIR "/bin/refinery");
    return RunProgram(arguments, {{"HOME", folder_.string()}, {"XDG_STATE_HOME", ""}, {"REFINERY_COORDINATOR", ""}});
  }

  std::string Write(const std::string& name, const std::string& text) {
    EXPECT_TRUE(WriteFileAtomically(folder_ / name, text).ok());
    return (folder_ / name).string();
  }

  std::filesystem::path folder_;
};

TEST_F(CommandLineTest, MissingRecipe) {
  for (const char* command : {"run", "submit", "plan"}) {
    Output output = Refinery({command, "/no/such/recipe.yaml"});
    EXPECT_EQ(output.code, 2) << command;
    EXPECT_THAT(output.err, AllOf(HasSubstr("refinery: "), HasSubstr("/no/such/recipe.yaml")));
    EXPECT_THAT(output.out, IsEmpty());
  }
}

// Goal: what a command line cannot mean is said in one sentence, with the nearest word that exists.
TEST_F(CommandLineTest, WordsThatNobodyKnows) {
  const auto error_of = [&](std::vector<std::string> arguments) {
    const Output output = Refinery(std::move(arguments));
    EXPECT_EQ(output.code, 2);
    EXPECT_THAT(output.out, IsEmpty());
    return output.err;
  };
  EXPECT_EQ(error_of({"sumbit", "r.yaml"}), "refinery: there is no command 'sumbit'; did you mean 'submit'? See refinery --help\n");
  EXPECT_EQ(error_of({"submit", "--prioritty", "3"}),
            "refinery submit: there is no flag '--prioritty'; did you mean '--priority'? See refinery submit --help\n");
  EXPECT_EQ(error_of({"submit"}), "refinery submit: RECIPE is required. See refinery submit --help\n");
  EXPECT_THAT(error_of({"admin", "bakcup"}), HasSubstr("refinery admin: there is no command 'bakcup'; did you mean 'backup'?"));
  EXPECT_THAT(error_of({}), HasSubstr("refinery: A subcommand is required. See refinery --help"));
  EXPECT_THAT(error_of({"list", "--coordinater", "x:1"}), HasSubstr("'--coordinator'"));
}

// Goal: an unknown key names its line and the nearest known key.
TEST_F(CommandLineTest, UnknownRecipeKey) {
  std::string recipe = Write("bad.yaml", "name: bad\nstudent: {model: m.gguf}\ndistill:\n  temprature: 2\n");
  Output output = Refinery({"submit", recipe});
  EXPECT_EQ(output.code, 2);
  EXPECT_THAT(output.err, AllOf(HasSubstr("bad.yaml:4"), HasSubstr("temprature"), HasSubstr("'temperature'")));
}

// Goal: a benchmark that was not pulled is named together with the command that brings it.
TEST_F(CommandLineTest, MissingBenchmark) {
  std::string recipe = Write("r.yaml",
                             "name: r\nstudent: {model: m.gguf}\n"
                             "data: {task: arc_easy, seeds: {benchmark: arc_easy, split: train}}\n");
  Output output = Refinery({"submit", recipe});
  EXPECT_EQ(output.code, 2);
  EXPECT_THAT(output.err, HasSubstr("refinery data pull arc_easy"));
}

TEST_F(CommandLineTest, UnreachableCoordinator) {
  for (const std::vector<std::string>& command :
       {std::vector<std::string>{"list"}, {"describe", "x"}, {"watch", "x"}, {"worker", "list"}, {"fetch", "x"}}) {
    std::vector<std::string> arguments = {"--coordinator", kNobody};
    arguments.insert(arguments.end(), command.begin(), command.end());
    Output output = Refinery(arguments);
    EXPECT_EQ(output.code, 2) << command[0];
    EXPECT_THAT(output.err, AllOf(HasSubstr(kNobody), HasSubstr("start refineryd"))) << command[0];
    EXPECT_THAT(output.out, IsEmpty());
  }
}

// Goal: an address without a port is said to be one, and not dialled at gRPC's own default port.
TEST_F(CommandLineTest, AddressWithoutPort) {
  for (const char* address : {"localhost", "localhost:99999", "localhost:abc", "::1:7433"}) {
    const Output output = Refinery({"--coordinator", address, "list"});
    EXPECT_EQ(output.code, 2) << address;
    EXPECT_THAT(output.err, AllOf(HasSubstr("HOST:PORT"), HasSubstr(address)));
  }
}

TEST_F(CommandLineTest, WrongUsage) {
  EXPECT_EQ(Refinery({}).code, 2);
  EXPECT_EQ(Refinery({"lisst"}).code, 2);
  EXPECT_EQ(Refinery({"list", "-o", "xml"}).code, 2);
  EXPECT_EQ(Refinery({"data", "pull", "arc_esy"}).code, 2);
  EXPECT_THAT(Refinery({"data", "pull", "arc_esy"}).err, HasSubstr("did you mean 'arc_easy'?"));
}

TEST_F(CommandLineTest, HelpDocumentsExitCodes) {
  Output output = Refinery({"--help"});
  EXPECT_EQ(output.code, 0);
  EXPECT_THAT(output.out, ContainsRegex("Exit codes: 0 .* 1 .* 2 "));
  for (const char* command : {"run", "submit", "plan", "watch", "list", "describe", "logs", "cancel", "fetch", "report",
                              "worker", "version", "completion", "data"}) {
    EXPECT_THAT(output.out, HasSubstr(command));
    EXPECT_EQ(Refinery({command, "--help"}).code, 0) << command;
  }
}

// Goal: the flags of the program may stand before and behind a command.
TEST_F(CommandLineTest, JsonOutput) {
  for (const std::vector<std::string>& arguments :
       {std::vector<std::string>{"-o", "json", "version"}, {"version", "-o", "json"}}) {
    Output output = Refinery(arguments);
    EXPECT_EQ(output.code, 0);
    EXPECT_THAT(output.out, AllOf(HasSubstr("\"version\": \"" REFINERY_VERSION "\""), HasSubstr("\"protocol\": 1")));
  }
}

// Goal: each script is accepted by its shell, and bash completes commands and flags with it.
TEST_F(CommandLineTest, Completion) {
  Output bash = Refinery({"completion", "bash"});
  ASSERT_EQ(bash.code, 0);
  std::string script = Write("complete.bash", bash.out +
                             "COMP_WORDS=(refinery wat); COMP_CWORD=1; _refinery; echo ${COMPREPLY[@]}\n"
                             "COMP_WORDS=(refinery run --fr); COMP_CWORD=2; _refinery; echo ${COMPREPLY[@]}\n"
                             "COMP_WORDS=(refinery worker li); COMP_CWORD=2; _refinery; echo ${COMPREPLY[@]}\n");
  Output run = RunProgram({"/bin/bash", script}, {});
  EXPECT_EQ(run.code, 0) << run.err;
  EXPECT_EQ(run.out, "watch\n--fresh\nlist\n");
  EXPECT_THAT(Refinery({"completion", "zsh"}).out, HasSubstr("bashcompinit"));
  EXPECT_THAT(Refinery({"completion", "fish"}).out, HasSubstr("complete -c refinery -f -n 'not __fish_seen"));
  EXPECT_EQ(Refinery({"completion", "tcsh"}).code, 2);
}

}  // namespace
}  // namespace refinery
