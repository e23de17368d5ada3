// Tests of the programs that `refinery run` brings along, with the real refineryd and refinery-worker and a fake task program.

#include "client/local/local_programs.h"

#include <signal.h>
#include <stdlib.h>

#include <thread>

#include <nlohmann/json.hpp>

#include "client/globals.h"
#include "common/files.h"
#include "tests/support/run_program.h"
#include "tests/support/status_matchers.h"

namespace refinery::client {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::IsOk;
using testing::Output;
using testing::RunProgram;
using testing::StatusIs;

constexpr char kPrograms[] = REFINERY_BINARY_DIR "/bin";

class LocalProgramsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "local-XXXXXX").string();
    folder_ = ::mkdtemp(name.data());
    options_ = {.state = folder_ / "state", .programs = kPrograms, .worker_cache = folder_ / "cache",
                .task_program = FAKE_TASK};
  }
  void TearDown() override {
    for (const char* name : {"refinery-worker", "refineryd"}) {
      if (pid_t pid = Pid(name); pid > 0) StopProcess(pid, ProcessStartTime(pid), std::chrono::seconds(10));
    }
    std::filesystem::remove_all(folder_);
  }

  pid_t Pid(const std::string& name) {
    auto text = ReadFile(folder_ / "state/run.json");
    return text.ok() ? nlohmann::json::parse(*text)[name].value("pid", 0) : 0;
  }

  std::filesystem::path folder_;
  LocalOptions options_;
};

// Goal: the second user finds the programs of the first, and only the last one stops them.
TEST_F(LocalProgramsTest, StartsAttachesAndStops) {
  auto first = LocalPrograms::Open(options_);
  ASSERT_THAT(first, IsOk());
  ASSERT_THAT((*first)->Start(), IsOk());
  EXPECT_FALSE((*first)->attached());
  pid_t coordinator = Pid("refineryd");
  EXPECT_GT(ProcessStartTime(coordinator), 0u);
  {
    auto second = LocalPrograms::Open(options_);
    ASSERT_THAT(second, IsOk());
    ASSERT_THAT((*second)->Start(), IsOk());
    EXPECT_TRUE((*second)->attached());
    EXPECT_EQ((*second)->address(), (*first)->address());
    EXPECT_FALSE((*second)->StopIfLast());
  }
  EXPECT_EQ(Pid("refineryd"), coordinator);
  EXPECT_TRUE((*first)->StopIfLast());
  EXPECT_EQ(ProcessStartTime(coordinator), 0u);
}

// Goal: a program that is killed comes back, the coordinator at the same address, and the user is told.
TEST_F(LocalProgramsTest, RestartsWhatDied) {
  auto programs = LocalPrograms::Open(options_);
  ASSERT_THAT(programs, IsOk());
  ASSERT_THAT((*programs)->Start(), IsOk());
  EXPECT_THAT((*programs)->Supervise(), testing::IsOkAndHolds(std::string()));
  std::string address = (*programs)->address();
  for (const char* name : {"refineryd", "refinery-worker"}) {
    pid_t before = Pid(name);
    ASSERT_EQ(::kill(before, SIGKILL), 0);
    std::string said;
    for (int i = 0; i < 100 && said.empty(); ++i) {
      auto remark = (*programs)->Supervise();
      ASSERT_THAT(remark, IsOk());
      said = *remark;
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
    }
    EXPECT_THAT(said, AllOf(HasSubstr(name), HasSubstr("started again")));
    EXPECT_NE(Pid(name), before);
    EXPECT_THAT(Connect(address), IsOk());
  }
  EXPECT_TRUE((*programs)->StopIfLast());
}

TEST_F(LocalProgramsTest, NamesTheMissingProgram) {
  options_.programs = folder_;
  EXPECT_THAT(LocalPrograms::Open(options_), StatusIs(absl::StatusCode::kNotFound, HasSubstr("refineryd")));
}

// Goal: request ids stay with the state folder.
TEST_F(LocalProgramsTest, RemembersRequestIds) {
  auto programs = LocalPrograms::Open(options_);
  ASSERT_THAT(programs, IsOk());
  EXPECT_THAT((*programs)->RequestId("sha256:1"), testing::IsOkAndHolds(std::string()));
  ASSERT_THAT((*programs)->SetRequestId("sha256:1", "id-1"), IsOk());
  EXPECT_THAT((*LocalPrograms::Open(options_))->RequestId("sha256:1"), testing::IsOkAndHolds(std::string("id-1")));
}

// The whole command with fake tasks.
class RunCommandTest : public LocalProgramsTest {
 protected:
  void SetUp() override {
    LocalProgramsTest::SetUp();
    Write("model.gguf", "x");
    Write("seeds.jsonl",
          R"({"id":"1","question":"q","choices":{"text":["a","b"],"label":["A","B"]},"answerKey":"A"})" "\n");
    Write("recipe.yaml",
          "name: tiny\nstudent: {model: model.gguf}\n"
          "data: {task: arc_easy, seeds: {file: seeds.jsonl}}\n"
          "search: {trials: 0}\n"
          "evaluate: {benchmarks: [{name: arc_easy, file: seeds.jsonl}]}\n");
  }
  void Write(const std::string& name, const std::string& text) {
    ASSERT_THAT(WriteFileAtomically(folder_ / name, text), IsOk());
  }
  Output Refinery(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), Join(kPrograms, "/refinery"));
    return RunProgram(arguments, {{"HOME", folder_.string()}, {"XDG_STATE_HOME", ""}, {"REFINERY_COORDINATOR", ""}});
  }
  std::vector<std::string> Run() {
    return {"run", (folder_ / "recipe.yaml").string(), "--state", options_.state.string(), "--cache",
            options_.worker_cache.string(), "--task-program", options_.task_program.string()};
  }
};

// Goal: one command takes a recipe to a fetched result, stops its programs, and a second time gives the same job at once.
TEST_F(RunCommandTest, RunsToTheResultAndRepeatsIt) {
  Output first = Refinery(Run());
  ASSERT_EQ(first.code, 0) << first.err << first.out;
  EXPECT_THAT(first.out, AllOf(HasSubstr("artifact  " + (options_.state / "result").string()), HasSubstr("report.html")));
  EXPECT_EQ(Pid("refineryd"), 0);
  Output second = Refinery(Run());
  EXPECT_EQ(second.code, 0) << second.err;
  EXPECT_EQ(second.out, first.out);
}

// Goal: the plan is printed without a coordinator anywhere, and nothing is left behind.
TEST_F(RunCommandTest, PlanNeedsNoCoordinator) {
  Output plan = Refinery({"plan", (folder_ / "recipe.yaml").string()});
  EXPECT_EQ(plan.code, 0) << plan.err;
  EXPECT_THAT(plan.out, HasSubstr("quantize"));
  Output json = Refinery({"-o", "json", "plan", (folder_ / "recipe.yaml").string()});
  EXPECT_EQ(json.code, 0);
  EXPECT_TRUE(nlohmann::json::parse(json.out).contains("tasks"));
}

}  // namespace
}  // namespace refinery::client
