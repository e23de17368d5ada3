// Request ids in the log: what was answered once is not done again, also by a coordinator that was restarted.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/server/jobs/tiny_job.h"
#include "tests/support/status_matchers.h"

namespace refinery::jobs {
namespace {

using refinery::testing::CoreDriver;
using refinery::testing::IsOk;
using refinery::testing::IsOkAndHolds;
using refinery::testing::StatusCodeIs;

v1::RequestMark Mark(const std::string& key, const std::string& digest = "d") {
  v1::RequestMark mark;
  mark.set_key(key);
  mark.set_digest(digest);
  return mark;
}

// Pauses or resumes job "a" of `core`, as a call with a request id does.
Status Call(Core& core, CoreDriver& driver, const v1::RequestMark& mark, bool pause) {
  return core.Once(mark, driver.now, &driver.events, [&] {
    return pause ? core.PauseJob("a", "", driver.now, &driver.events) : core.ResumeJob("a", "", driver.now, &driver.events);
  });
}

Core Restarted(const CoreDriver& driver, bool from_snapshot) {
  if (!from_snapshot) return driver.Replayed();
  Core core(CoreDriver::WithVersion({}));
  RF_CHECK(core.Restore(driver.core.Snapshot()).ok());
  return core;
}

// Goal: a late copy of an old call does nothing, before and after a restart, from the log and from a snapshot.
TEST(RequestsTest, ACallIsDoneOnceAlsoAcrossARestart) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  ASSERT_THAT(Call(driver.core, driver, Mark("ann/p"), true), IsOk());
  ASSERT_THAT(Call(driver.core, driver, Mark("ann/r"), false), IsOk());
  ASSERT_NE(driver.Job("a").state, v1::Job::PAUSED);
  EXPECT_THAT(Call(driver.core, driver, Mark("ann/p"), true), IsOk());
  EXPECT_NE(driver.Job("a").state, v1::Job::PAUSED);
  for (const bool from_snapshot : {false, true}) {
    Core restarted = Restarted(driver, from_snapshot);
    EXPECT_EQ(Dump(restarted.state()), Dump(driver.core.state()));
    EXPECT_EQ(restarted.Snapshot(), driver.core.Snapshot());
    const size_t count = driver.events.size();
    EXPECT_THAT(Call(restarted, driver, Mark("ann/p"), true), IsOk());
    EXPECT_NE(restarted.state().jobs.at("a").state, v1::Job::PAUSED);
    EXPECT_EQ(driver.events.size(), count);
    EXPECT_THAT(Call(restarted, driver, Mark("ann/p", "another call"), true), StatusCodeIs(absl::StatusCode::kAlreadyExists));
    EXPECT_THAT(restarted.WasDone(Mark("bob/p")), IsOkAndHolds(false));  // ids of two callers have nothing to do with each other
  }
}

// Goal: a call that found everything as it was wanted is remembered too, without a trace in the job; one that failed is not.
TEST(RequestsTest, WhatChangedNothingIsRememberedWhatFailedIsNot) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  const uint64_t before = driver.Job("a").last_seq;
  ASSERT_THAT(Call(driver.core, driver, Mark("ann/r"), false), IsOk());  // it is not paused
  EXPECT_TRUE(driver.events.back().has_request_answered());
  EXPECT_EQ(driver.Job("a").last_seq, before);
  EXPECT_THAT(driver.Replayed().WasDone(Mark("ann/r")), IsOkAndHolds(true));

  ASSERT_THAT(driver.core.KillJob("a", "", driver.now, &driver.events), IsOk());
  EXPECT_THAT(Call(driver.core, driver, Mark("ann/p"), true), StatusCodeIs(absl::StatusCode::kFailedPrecondition));
  EXPECT_THAT(driver.core.WasDone(Mark("ann/p")), IsOkAndHolds(false));
  ASSERT_THAT(driver.core.RetryJob("a", "", driver.now, &driver.events), IsOk());
  EXPECT_FALSE(driver.events.back().has_request());  // the mark of the failed call went with it
  ASSERT_THAT(Call(driver.core, driver, Mark("ann/p"), true), IsOk());
  EXPECT_EQ(driver.Job("a").state, v1::Job::PAUSED);
}

// A call without an id is done each time and leaves no mark.
TEST(RequestsTest, WithoutAnIdNothingIsRemembered) {
  CoreDriver driver;
  ASSERT_THAT(driver.Create("a"), IsOk());
  for (const bool pause : {true, false, true}) ASSERT_THAT(Call(driver.core, driver, {}, pause), IsOk());
  EXPECT_EQ(driver.Job("a").state, v1::Job::PAUSED);
  EXPECT_TRUE(driver.core.state().answered.order().empty());
}

TEST(RequestsTest, TheOldestAreForgottenByNumberAndByAge) {
  AnsweredRequests answered;
  for (size_t i = 0; i < AnsweredRequests::kMaxRequests + 5; ++i) answered.Add(Join("k", i), "d", 1000);
  EXPECT_EQ(answered.order().size(), AnsweredRequests::kMaxRequests);
  EXPECT_EQ(answered.Find("k4"), nullptr);
  ASSERT_NE(answered.Find("k5"), nullptr);
  answered.Add("k5", "other", 2000);  // a known key stays as it is
  EXPECT_EQ(answered.Find("k5")->digest, "d");
  answered.Add("later", "d", 1001 + AnsweredRequests::kMaxAgeMs);
  EXPECT_EQ(answered.order().size(), 1u);
  EXPECT_NE(answered.Find("later"), nullptr);
}

}  // namespace
}  // namespace refinery::jobs
