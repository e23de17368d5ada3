#include "server/scheduler/schedule.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace refinery::scheduler {
namespace {

std::string Text(const std::vector<Decision>& decisions) {
  std::string text;
  for (const Decision& decision : decisions) text += decision.job + "/" + decision.path + "@" + decision.worker + " ";
  return text;
}

TEST(ScheduleTest, TakesTasksInTheirOrderAndWorkersWithTheMostRoom) {
  EXPECT_EQ(Text(Schedule({{.job = "a", .path = "1"}, {.job = "a", .path = "2"}, {.job = "b", .path = "1"}},
                          {{.id = "x", .free_slots = 1}, {.id = "y", .free_slots = 2}}, {"x", "y"})),
            "a/1@y a/2@x b/1@y ");
}

TEST(ScheduleTest, GrantsNothingWithoutRoom) {
  EXPECT_EQ(Text(Schedule({{.job = "a", .path = "1"}}, {{.id = "x", .free_slots = 0}}, {"x"})), "");
}

TEST(ScheduleTest, PrefersTheWorkerThatKnowsTheJob) {
  EXPECT_EQ(Text(Schedule({{.job = "a", .path = "1", .worked = {"x"}}}, {{.id = "x", .free_slots = 1}, {.id = "y", .free_slots = 9}},
                          {"x", "y"})),
            "a/1@x ");
}

// Goal: "elsewhere" is kept while there is an elsewhere, even a busy one, and given up when there is none.
TEST(ScheduleTest, AvoidsAWorkerWhileAnotherOneLives) {
  const std::vector<jobs::Core::ReadyTask> tasks = {{.job = "a", .path = "1", .avoid = {"x"}, .worked = {"x"}}};
  EXPECT_EQ(Text(Schedule(tasks, {{.id = "x", .free_slots = 1}, {.id = "y", .free_slots = 1}}, {"x", "y"})), "a/1@y ");
  EXPECT_EQ(Text(Schedule(tasks, {{.id = "x", .free_slots = 1}}, {"x", "y"})), "");
  EXPECT_EQ(Text(Schedule(tasks, {{.id = "x", .free_slots = 1}}, {"x"})), "a/1@x ");
}

}  // namespace
}  // namespace refinery::scheduler
