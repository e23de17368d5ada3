// Tests of what the client shows.

#include <google/protobuf/util/json_util.h>

#include "client/exit_code.h"
#include "client/recipe_input.h"
#include "client/render/job_text.h"
#include "client/render/json.h"
#include "client/render/progress_view.h"
#include "client/render/table.h"
#include "client/render/terminal.h"
#include "tests/support/status_matchers.h"

namespace refinery::client {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::MatchesRegex;

v1::Job ParseJob(const std::string& json) {
  v1::Job job;
  EXPECT_TRUE(google::protobuf::util::JsonStringToMessage(json, &job).ok()) << json;
  return job;
}

TEST(RenderTest, TablesAlignByCharacters) {
  EXPECT_EQ(TableText({"A", "B"}, {{"wörd", "1"}, {"x", "2"}}), "A     B\nwörd  1\nx     2\n");
}

TEST(RenderTest, WorkersShowTheirDevicesDiskAndLabels) {
  v1::ListWorkersResponse workers;
  v1::WorkerInfo* worker = workers.add_workers();
  worker->set_id("w");
  worker->set_free_disk_bytes(uint64_t{200} << 30);
  (*worker->mutable_labels())["zone"] = "a";
  (*worker->mutable_labels())["rack"] = "7\x1b[2J";
  worker->add_devices("cpu");
  worker->add_devices("cuda:0");
  v1::Device* device = worker->add_device_details();
  device->set_name("cuda:0");
  device->set_model("NVIDIA H200");
  device->set_memory_bytes(uint64_t{140} << 30);
  workers.add_workers()->set_id("plain");
  const std::string table = WorkerTable(workers);
  EXPECT_NE(table.find(Join("cpu,cuda:0 (NVIDIA H200, ", SizeText(140.0 * (1 << 30)), ")")), std::string::npos) << table;
  EXPECT_NE(table.find(SizeText(200.0 * (1 << 30))), std::string::npos) << table;
  EXPECT_NE(table.find("zone=a"), std::string::npos) << table;
  EXPECT_EQ(table.find('\x1b'), std::string::npos);
}

TEST(RenderTest, Durations) {
  EXPECT_EQ(DurationText(0.25), "250 ms");
  EXPECT_EQ(DurationText(42), "42 s");
  EXPECT_EQ(DurationText(185), "3m05s");
  EXPECT_EQ(DurationText(7620), "2h07m");
  EXPECT_EQ(SizeText(1536), "1.5 KiB");
}

// Goal: text from a log cannot steer the terminal.
TEST(RenderTest, ControlCharactersAreRemoved) {
  EXPECT_EQ(Printable("a\033[2Jb\r\tc\n\x7f"), "a[2Jb\tc\n");
}

// Goal: -o json holds every field under its .proto name, also those with default values.
TEST(RenderTest, JsonSchemaDoesNotDependOnValues) {
  std::string text = ToJson(v1::Job(), JsonForm::kLine);
  for (const char* field : {"\"create_time_ms\":\"0\"", "\"tasks\":[]", "\"state\":\"STATE_UNSPECIFIED\""})
    EXPECT_THAT(text, HasSubstr(field));
}

TEST(RenderTest, ExitCodes) {
  EXPECT_EQ(ExitCodeOf(ParseJob(R"({"state":"SUCCEEDED"})")), kOk);
  EXPECT_EQ(ExitCodeOf(ParseJob(R"({"state":"CANCELLED"})")), kJobCancelled);
  EXPECT_EQ(ExitCodeOf(ParseJob(R"({"state":"FAILED","tasks":[{"state":"DEAD","error":{"failureClass":"BUG"}}]})")),
            kFailed);
  EXPECT_EQ(ExitCodeOf(ParseJob(R"({"state":"FAILED","tasks":[{"state":"DEAD","error":{"failureClass":"USER"}}]})")),
            kWrongInput);
  // A user error that did not end the job is none of its result.
  EXPECT_EQ(ExitCodeOf(ParseJob(R"({"state":"FAILED","tasks":[{"state":"DONE","error":{"failureClass":"USER"}}]})")),
            kFailed);
}

// Goal: the estimate by hand: two trainings took 10 s and 20 s (mean 15), one runs at 40 %, one waits: 9 + 15 = 24 s.
TEST(RenderTest, TimeLeft) {
  v1::Job job = ParseJob(R"({"tasksTotal":4,"tasks":[
      {"kind":"TRAIN","state":"DONE","seconds":10},{"kind":"TRAIN","state":"DONE","seconds":20},
      {"kind":"TRAIN","state":"LEASED","progress":{"done":4,"total":10}},{"kind":"TRAIN","state":"READY"}]})");
  EXPECT_NEAR(SecondsLeft(job).value_or(-1), 24, 1e-9);
  // The running one is slower than the finished ones were: its phase alone takes 30 s. A phase of one that waits says nothing.
  job.mutable_tasks(2)->set_path("slow");
  job.mutable_tasks(3)->set_path("waits");
  EXPECT_NEAR(SecondsLeft(job, {{"slow", 30}, {"waits", 100}}).value_or(-1), 45, 1e-9);
  EXPECT_NEAR(SecondsLeft(job, {{"slow", 3}}).value_or(-1), 24, 1e-9);
  EXPECT_FALSE(SecondsLeft(ParseJob(R"({"tasks":[{"kind":"TRAIN","state":"READY"}]})")).has_value());
}

TEST(RenderTest, ProgressPicture) {
  ProgressView view(2);
  view.SetJob(ParseJob(R"({"id":"j1","state":"RUNNING","recipe":{"name":"demo"},"tasksDone":3,"tasksTotal":9,
      "tasks":[{"path":"trial/0/replicate/1","kind":"TRAIN","state":"LEASED","attempt":1},
               {"path":"merge","kind":"MERGE","state":"BLOCKED"}],
      "trials":[{"index":0,"state":"SUCCEEDED","mean":1.5,"settings":{"optimizer":"muon"}},
                {"index":1,"state":"SUCCEEDED","mean":1.25,"settings":{"optimizer":"adamw"}}]})"));
  v1::WatchJobResponse::Progress progress;
  progress.set_path("trial/0/replicate/1");
  progress.mutable_progress()->set_phase("training");
  progress.mutable_progress()->set_done(14);
  progress.mutable_progress()->set_total(20);
  progress.mutable_progress()->set_loss(1.2345);
  progress.mutable_progress()->set_tokens_per_second(812.4);
  view.OnProgress(progress);
  EXPECT_THAT(view.Lines(),
              ElementsAre(MatchesRegex("job j1 \\(demo\\)  running  3/9 tasks  .*time left unknown"),
                          "  train  trial/0/replicate/1  training  14/20 (70 %)  loss 1.2345  812 tokens/s",
                          HasSubstr("best so far: trial 1, loss 1.2500 (adamw")));
}

// Goal: request ids are UUIDs, equal for equal content only.
TEST(RenderTest, RequestIds) {
  RecipeInput a, b;
  a.recipe.set_name("x");
  b.recipe.set_name("x");
  EXPECT_EQ(ContentDigest(a), ContentDigest(b));
  b.digests["seeds"] = "sha256:1";
  EXPECT_NE(ContentDigest(a), ContentDigest(b));
  const char* uuid = "[0-9a-f]{8}-[0-9a-f]{4}-8[0-9a-f]{3}-a[0-9a-f]{3}-[0-9a-f]{12}";
  EXPECT_THAT(RequestIdOf(ContentDigest(a)), MatchesRegex(uuid));
  EXPECT_THAT(RandomRequestId(), MatchesRegex(uuid));
  EXPECT_NE(RandomRequestId(), RandomRequestId());
}

}  // namespace
}  // namespace refinery::client
