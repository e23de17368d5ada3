#include "server/store/event_log.h"

#include <SQLiteCpp/SQLiteCpp.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>

#include "tests/server/store/temp_folder.h"
#include "tests/support/status_matchers.h"

namespace refinery::store {
namespace {

using refinery::testing::IsOk;
using refinery::testing::IsOkAndHolds;
using refinery::testing::StatusCodeIs;
using refinery::testing::StatusIs;
using refinery::testing::TempFolder;
using ::testing::HasSubstr;

v1::Event MakeEvent(uint64_t seq, const std::string& job) {
  v1::Event event;
  event.set_seq(seq);
  event.set_job(job);
  event.mutable_task_finished()->set_path(Join("task/", seq));
  event.mutable_task_finished()->set_task_digest(Join("identity ", seq));
  event.mutable_task_finished()->mutable_output()->set_digest(Join("output ", seq));
  return event;
}

std::vector<uint64_t> Replayed(EventLog& log) {
  std::vector<uint64_t> seqs;
  EXPECT_THAT(log.Replay([&](const v1::Event& event) {
    seqs.push_back(event.seq());
    return absl::OkStatus();
  }), IsOk());
  return seqs;
}

std::vector<std::string> Owners(EventLog& log) {
  std::vector<std::string> texts;
  const StatusOr<std::vector<ArtifactOwner>> owners = log.ReadOwners();
  EXPECT_THAT(owners, IsOk());
  for (const ArtifactOwner& owner : *owners) texts.push_back(Join(owner.digest, " ", owner.tenant));
  return texts;
}

// Goal: who uploaded what lasts, without events and with them, and is there once; a folder of the schema before gains the table.
TEST(EventLogTest, KeepsOwnersAndUpgradesAFolderWithoutThem) {
  TempFolder folder;
  {
    auto log = EventLog::Open(folder.path());
    ASSERT_THAT(log, IsOk());
    ASSERT_THAT((*log)->Append({MakeEvent(1, "a")}), IsOk());
  }
  {
    SQLite::Database old((folder.path() / "refinery.db").string(), SQLite::OPEN_READWRITE);
    old.exec("DROP TABLE artifact_owner");
    old.exec("PRAGMA user_version=2");
  }
  {
    auto log = EventLog::Open(folder.path());
    ASSERT_THAT(log, IsOk());
    EXPECT_EQ(Replayed(**log), std::vector<uint64_t>{1});
    EXPECT_TRUE(Owners(**log).empty());
    ASSERT_THAT((*log)->Append({}, {{"d1", "physics"}, {"d1", "biology"}}), IsOk());
    ASSERT_THAT((*log)->Append({MakeEvent(2, "a")}, {{"d1", "physics"}, {"d2", "physics"}}), IsOk());
  }
  auto log = EventLog::Open(folder.path());
  ASSERT_THAT(log, IsOk());
  EXPECT_EQ((*log)->last_seq(), 2u);
  EXPECT_EQ(Owners(**log), (std::vector<std::string>{"d1 biology", "d1 physics", "d2 physics"}));
  ASSERT_THAT((*log)->RemoveOwners({{"d1", "physics"}}), IsOk());
  EXPECT_EQ(Owners(**log), (std::vector<std::string>{"d1 biology", "d2 physics"}));
}

TEST(EventLogTest, KeepsEventsAndResultsOverAReopen) {
  TempFolder folder;
  {
    auto log = EventLog::Open(folder.path());
    ASSERT_THAT(log, IsOk());
    ASSERT_THAT((*log)->Append({MakeEvent(1, "a"), MakeEvent(2, "b"), MakeEvent(3, "a")}), IsOk());
  }
  auto log = EventLog::Open(folder.path());
  ASSERT_THAT(log, IsOk());
  EXPECT_FALSE((*log)->was_unclean());
  EXPECT_EQ((*log)->last_seq(), 3);
  EXPECT_THAT(Replayed(**log), ::testing::ElementsAre(1, 2, 3));
  EXPECT_THAT((*log)->ResultOf("identity 2"), IsOkAndHolds("output 2"));
  EXPECT_THAT((*log)->ResultOf("identity 9"), StatusCodeIs(absl::StatusCode::kNotFound));
  const auto page = (*log)->Read("a", 1, 10);
  ASSERT_THAT(page, IsOk());
  ASSERT_EQ(page->size(), 1);
  EXPECT_EQ(page->front().seq(), 3);
}

// Goal: nothing of a batch is kept when one of its events is wrong.
TEST(EventLogTest, RefusesAGapWholly) {
  TempFolder folder;
  auto log = EventLog::Open(folder.path());
  ASSERT_THAT(log, IsOk());
  ASSERT_THAT((*log)->Append({MakeEvent(1, "a")}), IsOk());
  EXPECT_THAT((*log)->Append({MakeEvent(2, "a"), MakeEvent(4, "a")}), StatusCodeIs(absl::StatusCode::kInternal));
  EXPECT_THAT(Replayed(**log), ::testing::ElementsAre(1));
  EXPECT_THAT((*log)->Append({MakeEvent(2, "a")}), IsOk());
}

// Goal: a batch for which there is no room is not there, neither now nor after a reopen, and the log goes on at the same number when there
// is room.  Method: a bound on the size of the database, reached in the middle of a batch.
TEST(EventLogTest, GoesOnAfterAFullDisk) {
  TempFolder folder;
  {
    auto log = EventLog::Open(folder.path());
    ASSERT_THAT(log, IsOk());
    ASSERT_THAT((*log)->Append({MakeEvent(1, "a")}), IsOk());
    (*log)->LimitBytes(200 << 10);
    v1::Event large = MakeEvent(3, "a");
    large.mutable_task_finished()->set_path(std::string(1 << 20, 'x'));
    for (int again = 0; again < 3; ++again) {
      EXPECT_THAT((*log)->Append({MakeEvent(2, "a"), large}),
                  StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("free space")));
      EXPECT_EQ((*log)->last_seq(), 1);
      EXPECT_THAT(Replayed(**log), ::testing::ElementsAre(1));
      EXPECT_THAT((*log)->ResultOf("identity 2"), StatusCodeIs(absl::StatusCode::kNotFound));
      EXPECT_THAT((*log)->TryWriting(), StatusCodeIs(absl::StatusCode::kResourceExhausted));
    }
    (*log)->LimitBytes(0);
    EXPECT_THAT((*log)->TryWriting(), IsOk());
    ASSERT_THAT((*log)->Append({MakeEvent(2, "a"), large}), IsOk());
  }
  auto log = EventLog::Open(folder.path());
  ASSERT_THAT(log, IsOk());
  EXPECT_FALSE((*log)->was_unclean());
  EXPECT_THAT(Replayed(**log), ::testing::ElementsAre(1, 2, 3));
}

// Goal: what was acknowledged survives a kill.  Method: a child appends and is killed in the middle; it tells each acknowledged
// number through a pipe, and the log must hold at least those, without a gap.
TEST(EventLogTest, AcknowledgedEventsSurviveAKill) {
  TempFolder folder;
  int fds[2];
  ASSERT_EQ(pipe(fds), 0);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    auto log = EventLog::Open(folder.path());
    for (uint64_t seq = 1; log.ok(); seq += 2) {
      if (!(*log)->Append({MakeEvent(seq, "a"), MakeEvent(seq + 1, "a")}).ok()) _exit(1);
      const uint64_t acknowledged = seq + 1;
      if (write(fds[1], &acknowledged, sizeof(acknowledged)) < 0) _exit(1);
    }
    _exit(1);
  }
  close(fds[1]);
  uint64_t acknowledged = 0;
  while (acknowledged < 20 && read(fds[0], &acknowledged, sizeof(acknowledged)) == sizeof(acknowledged)) {
  }
  kill(child, SIGKILL);
  waitpid(child, nullptr, 0);
  while (read(fds[0], &acknowledged, sizeof(acknowledged)) == sizeof(acknowledged)) {
  }
  close(fds[0]);
  ASSERT_GE(acknowledged, 20);

  auto log = EventLog::Open(folder.path());
  ASSERT_THAT(log, IsOk());
  EXPECT_TRUE((*log)->was_unclean());
  EXPECT_GE((*log)->last_seq(), acknowledged);
  EXPECT_EQ((*log)->last_seq() % 2, 0);  // whole batches only
  EXPECT_EQ(Replayed(**log).size(), (*log)->last_seq());
  EXPECT_THAT((*log)->Append({MakeEvent((*log)->last_seq() + 1, "a")}), IsOk());
}

TEST(EventLogTest, SecondCoordinatorIsKeptOut) {
  TempFolder folder;
  auto log = EventLog::Open(folder.path());
  ASSERT_THAT(log, IsOk());
  EXPECT_THAT(EventLog::Open(folder.path()),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr(Join("process ", getpid()))));
  log->reset();
  EXPECT_THAT(EventLog::Open(folder.path()), IsOk());
}

TEST(EventLogTest, DamagedDatabaseIsRefused) {
  TempFolder folder;
  std::ofstream(folder.path() / "refinery.db") << std::string(10'000, 'x');
  EXPECT_THAT(EventLog::Open(folder.path()), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("backup")));
}

}  // namespace
}  // namespace refinery::store
