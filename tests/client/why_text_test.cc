// Answers to "why" and "what changed", from jobs written by hand.

#include "client/render/why_text.h"

#include <gmock/gmock.h>
#include <google/protobuf/util/json_util.h>
#include <gtest/gtest.h>

namespace refinery::client {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

template <typename Message>
Message Parse(const std::string& json) {
  Message message;
  EXPECT_TRUE(google::protobuf::util::JsonStringToMessage(json, &message).ok()) << json;
  return message;
}

std::vector<v1::Event> Events(std::initializer_list<const char*> texts) {
  std::vector<v1::Event> events;
  for (const char* text : texts) events.push_back(Parse<v1::Event>(text));
  return events;
}

TEST(WhyTextTest, NamesWhatTheLongestWaitingTaskWaitsFor) {
  const auto job = Parse<v1::Job>(R"({"id": "j", "state": "RUNNING", "tenant": "physics", "priority": 5, "createTimeMs": 1000,
    "tasksDone": 1, "tasksTotal": 3, "tasks": [
    {"path": "import/student", "state": "DONE", "kind": "IMPORT_MODEL"},
    {"path": "train/0", "state": "READY", "needs": ["import/student"], "reasonCode": "WAIT_NO_MATCH", "why": "no worker has 80 GB"},
    {"path": "train/1", "state": "READY", "needs": ["import/student"], "reasonCode": "WAIT_NO_MATCH"}]})");
  const auto events = Events({R"({"timeMs": 61000, "taskFinished": {"path": "import/student"}})",
                              R"({"timeMs": 91000, "leaseExpired": {"path": "train/1"}})"});
  const std::string text = WhyText(job, events, Parse<v1::ListWorkersResponse>(R"({"workers": [{"id": "w", "state": "idle"},
    {"id": "v", "state": "lost"}]})"), 121000);
  EXPECT_THAT(text, HasSubstr("priority 5, tenant physics: 1 of 3 tasks are done."));
  EXPECT_THAT(text, HasSubstr("2 tasks are ready and wait (2 WAIT_NO_MATCH); longest train/0, for 60 s: no worker has 80 GB."));
  EXPECT_THAT(text, HasSubstr("1 worker lives."));
  EXPECT_THAT(text, HasSubstr("1 lease ran out"));
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1) << "one paragraph";
}

TEST(WhyTextTest, FindsTheStraggler) {
  const auto job = Parse<v1::Job>(R"({"id": "j", "state": "RUNNING", "tasks": [
    {"path": "train/0", "state": "DONE", "kind": "TRAIN", "seconds": 40}, {"path": "train/1", "state": "DONE", "kind": "TRAIN", "seconds": 50},
    {"path": "train/2", "state": "DONE", "kind": "TRAIN", "seconds": 60},
    {"path": "train/3", "state": "LEASED", "kind": "TRAIN", "attempt": 2, "worker": "w7", "progress": {"phase": "training", "done": 30, "total": 120}}]})");
  const auto at = [&](int64_t now_ms) {
    return WhyText(job, Events({R"({"timeMs": 100000, "taskLeased": {"path": "train/3"}})"}), {}, now_ms);
  };
  EXPECT_THAT(at(300'000), HasSubstr("longest train/3 (attempt 2 on w7), for 3m20s, training 25 % done: a straggler, for tasks of its kind "
                                     "took 50 s (median)"));
  EXPECT_THAT(at(150'000), Not(HasSubstr("straggler")));
  EXPECT_THAT(at(150'000), HasSubstr("No worker is there"));
}

TEST(WhyTextTest, SaysWhyAJobFailedAndWhatToDo) {
  const auto job = Parse<v1::Job>(R"({"id": "j", "state": "FAILED", "reason": "train/0: out of memory", "endTimeMs": 5000, "tasks": [
    {"path": "train/0", "state": "DEAD", "attempt": 3, "error": {"failureClass": "RESOURCE", "message": "out of memory"}}]})");
  const std::string text = WhyText(job, Events({R"({"taskLeased": {"path": "train/0"}})", R"({"taskLeased": {"path": "train/0"}})",
                                                R"({"taskLeased": {"path": "train/0"}})",
                                                R"({"taskFailed": {"path": "train/0", "error": {"failureClass": "RESOURCE"}}})",
                                                R"({"taskFailed": {"path": "train/0", "error": {"failureClass": "RESOURCE"}}})",
                                                R"({"taskFailed": {"path": "train/0", "error": {"failureClass": "INFRA"}}})"}),
                                   {}, 9000);
  EXPECT_THAT(text, HasSubstr("after 5 s (train/0: out of memory)"));
  EXPECT_THAT(text, HasSubstr("Of 3 attempts 3 failed (1 INFRA, 2 RESOURCE)."));
  EXPECT_THAT(text, HasSubstr("Last error, of train/0 (attempt 3, RESOURCE): out of memory."));
  EXPECT_THAT(text, HasSubstr("`refinery retry j`"));
}

TEST(DiffTextTest, CountsAndNamesCauses) {
  const std::string text = DiffText(Parse<v1::JobDiff>(R"({"before": "a", "after": "b", "tasks": [
    {"path": "import/student", "change": "RAN_AGAIN", "seconds": 2}, {"path": "curate", "change": "SAME"},
    {"path": "train/0", "change": "CHANGED", "seconds": 60, "causes": [{"field": "train.settings.learning_rate", "before": "0.001", "after": "0.002"}]},
    {"path": "quantize/refined", "change": "CHANGED", "seconds": 8, "causes": [{"field": "inputs.adapter", "before": "x", "after": "y", "becauseOf": "train/0"}]},
    {"path": "export", "change": "NOT_REACHED"}]})"));
  EXPECT_THAT(text, HasSubstr("b compared with a: 5 tasks, 1 out of the cache, 2 changed, 1 ran again unchanged, 1 not reached; 70 s of work."));
  EXPECT_THAT(text, HasSubstr("  train/0 (60 s): train.settings.learning_rate 0.001 -> 0.002\n"));
  EXPECT_THAT(text, HasSubstr("  quantize/refined (8 s): inputs.adapter has other bytes (from train/0)\n"));
  EXPECT_THAT(text, Not(HasSubstr("curate")));
}

}  // namespace
}  // namespace refinery::client
