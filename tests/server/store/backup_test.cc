// Snapshots, compaction, checks, backup and restore of a state folder.

#include "server/store/backup.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sqlite3.h>

#include <atomic>
#include <fstream>
#include <thread>

#include "common/files.h"
#include "server/store/blob_store.h"
#include "server/store/event_log.h"
#include "server/store/snapshots.h"
#include "tests/server/store/temp_folder.h"
#include "tests/support/status_matchers.h"

namespace refinery::store {
namespace {

using refinery::testing::IsOk;
using refinery::testing::IsOkAndHolds;
using refinery::testing::StatusCodeIs;
using refinery::testing::StatusIs;
using refinery::testing::TempFolder;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

v1::Event NoteOf(uint64_t seq, const std::string& job, size_t bytes = 10) {
  v1::Event event;
  event.set_seq(seq);
  event.set_job(job);
  event.mutable_task_note()->mutable_note()->set_text(std::string(bytes, 'n'));
  return event;
}

std::vector<uint64_t> Seqs(EventLog& log, uint64_t after = 0) {
  std::vector<uint64_t> seqs;
  EXPECT_THAT(log.Replay([&](const v1::Event& event) {
    seqs.push_back(event.seq());
    return absl::OkStatus();
  }, after), IsOk());
  return seqs;
}

std::unique_ptr<EventLog> OpenLog(const std::filesystem::path& folder) {
  auto log = EventLog::Open(folder);
  EXPECT_THAT(log, IsOk());
  return log.ok() ? *std::move(log) : nullptr;
}

TEST(SnapshotsTest, NewestWholeOneIsRead) {
  TempFolder folder;
  EXPECT_THAT(ReadNewestSnapshot(folder.path(), 100), StatusCodeIs(absl::StatusCode::kNotFound));
  for (const uint64_t seq : {7, 20, 31}) ASSERT_THAT(WriteSnapshot(folder.path(), seq, Join("state ", seq)), IsOk());
  EXPECT_THAT(ListSnapshots(folder.path()), ElementsAre(31, 20));  // two are kept
  EXPECT_EQ(ReadNewestSnapshot(folder.path(), 100)->bytes, "state 31");
  EXPECT_EQ(ReadNewestSnapshot(folder.path(), 30)->bytes, "state 20");

  // Damage of any byte is found, and the one before stands in.
  const auto file = folder.path() / "snapshots" / "00000000000000000031.snapshot";
  std::string bytes = *ReadFile(file);
  for (const size_t at : {size_t{0}, size_t{21}, size_t{40}, bytes.size() - 1}) {
    std::string damaged = bytes;
    damaged[at] = static_cast<char>(damaged[at] ^ 1);
    std::ofstream(file, std::ios::binary) << damaged;
    EXPECT_THAT(ReadSnapshotFile(folder.path(), 31), StatusCodeIs(absl::StatusCode::kDataLoss)) << at;
    EXPECT_EQ(ReadNewestSnapshot(folder.path(), 100)->seq, 20u);
  }
  std::ofstream(file, std::ios::binary) << bytes.substr(0, 50);
  EXPECT_EQ(ReadNewestSnapshot(folder.path(), 100)->seq, 20u);
}

// Goal: compaction takes the events of the named job alone, never beyond the snapshot, and survives a reopen.
TEST(CompactionTest, RemovesOnlyWhatASnapshotCovers) {
  TempFolder folder;
  auto log = OpenLog(folder.path());
  ASSERT_THAT(log->Append({NoteOf(1, "old"), NoteOf(2, "new"), NoteOf(3, "old"), NoteOf(4, "old"), NoteOf(5, "new")}), IsOk());
  EXPECT_THAT(log->Compact("old", 3, 1), IsOkAndHolds(1));
  EXPECT_EQ(log->CompactedTo("old"), 3u);
  EXPECT_EQ(log->CompactedTo("new"), 0u);
  EXPECT_THAT(log->Compact("old", 3, 100), IsOkAndHolds(1));
  EXPECT_THAT(log->Compact("old", 3, 100), IsOkAndHolds(0));
  log.reset();
  log = OpenLog(folder.path());
  EXPECT_EQ(log->CompactedTo("old"), 3u);
  EXPECT_EQ(log->last_seq(), 5u);
  EXPECT_THAT(Seqs(*log, 3), ElementsAre(4, 5));
  EXPECT_EQ(log->Read("new", 0, 10)->size(), 2u);
  // Without the snapshot the log is not whole any more, and says so.
  EXPECT_THAT(log->Replay([](const v1::Event&) { return absl::OkStatus(); }), StatusCodeIs(absl::StatusCode::kDataLoss));
  ASSERT_THAT(log->Append({NoteOf(6, "new")}), IsOk());
}

// Goal: a gap in the part that is replayed is found.  Method: another program deletes a row.
TEST(CompactionTest, MissingEventIsFound) {
  TempFolder folder;
  OpenLog(folder.path())->Append({NoteOf(1, "a"), NoteOf(2, "a"), NoteOf(3, "a")}).IgnoreError();
  sqlite3* db = nullptr;
  ASSERT_EQ(sqlite3_open((folder.path() / "refinery.db").c_str(), &db), SQLITE_OK);
  ASSERT_EQ(sqlite3_exec(db, "DELETE FROM events WHERE seq = 2", nullptr, nullptr, nullptr), SQLITE_OK);
  sqlite3_close(db);
  const auto log = OpenLog(folder.path());
  EXPECT_THAT(log->Replay([](const v1::Event&) { return absl::OkStatus(); }),
              StatusIs(absl::StatusCode::kDataLoss, HasSubstr("lacks event 2")));
}

// Goal: damaged pages are found after an unclean stop.  Method: zeros over a page in the middle of the file.
TEST(CheckTest, DamagedPageIsFoundAndRemembered) {
  TempFolder folder;
  {
    auto log = OpenLog(folder.path());
    std::vector<v1::Event> events;
    for (uint64_t seq = 1; seq <= 500; ++seq) events.push_back(NoteOf(seq, "a", 200));
    ASSERT_THAT(log->Append(events), IsOk());
  }
  EXPECT_THAT(CheckEventLog(folder.path()), IsOk());
  std::fstream file(folder.path() / "refinery.db", std::ios::in | std::ios::out | std::ios::binary);
  file.seekp(12 * 4096);
  file << std::string(4096, '\0');
  file.close();
  EXPECT_THAT(CheckEventLog(folder.path()), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("restore")));
  EXPECT_TRUE(std::filesystem::exists(folder.path() / "damaged_log"));
}

class BackupTest : public ::testing::Test {
 protected:
  void SetUp() override {
    log_ = OpenLog(State());
    blobs_ = *BlobStore::Open(State());
    ASSERT_THAT(log_->Append({NoteOf(1, "a"), NoteOf(2, "a")}), IsOk());
    digest_ = *blobs_->Put("an artifact");
    ASSERT_THAT(WriteSnapshot(State(), 1, "state"), IsOk());
    ASSERT_THAT(WriteFileAtomically(State() / "logs" / "a" / "train" / "1.log", "a line\n"), IsOk());
  }
  std::filesystem::path State() const { return folder_.path() / "state"; }
  std::filesystem::path Target(const char* name) const { return folder_.path() / name; }

  TempFolder folder_;
  std::unique_ptr<EventLog> log_;
  std::unique_ptr<BlobStore> blobs_;
  std::string digest_;
};

TEST_F(BackupTest, RestoredFolderIsTheOneThatWasCopied) {
  const auto info = Backup(State(), Target("backup"));
  ASSERT_THAT(info, IsOk());
  EXPECT_EQ(info->last_seq, 2u);
  EXPECT_EQ(info->blobs, 1u);
  EXPECT_EQ(info->bytes, 11u);
  ASSERT_THAT(log_->Append({NoteOf(3, "a")}), IsOk());  // goes on meanwhile
  EXPECT_THAT(Backup(State(), Target("backup")), StatusCodeIs(absl::StatusCode::kAlreadyExists));

  const auto restored = Restore(Target("backup"), Target("restored"));
  ASSERT_THAT(restored, IsOk());
  EXPECT_EQ(restored->last_seq, 2u);
  const auto log = OpenLog(Target("restored"));
  EXPECT_FALSE(log->was_unclean());
  EXPECT_THAT(Seqs(*log), ElementsAre(1, 2));
  EXPECT_THAT((*BlobStore::Open(Target("restored")))->Get(digest_), IsOkAndHolds("an artifact"));
  EXPECT_EQ(ReadNewestSnapshot(Target("restored"), 2)->bytes, "state");
  EXPECT_THAT(ReadFile(Target("restored") / "logs" / "a" / "train" / "1.log"), IsOkAndHolds("a line\n"));
  EXPECT_THAT(Restore(Target("backup"), Target("restored")), StatusCodeIs(absl::StatusCode::kAlreadyExists));
}

// Goal: a copy that is made while another thread commits is one moment of the log.  Method: the copy must hold 1 ... n for some n.
TEST_F(BackupTest, IsOneMomentOfALogInUse) {
  std::atomic<bool> stop = false;
  std::thread writer([&] {
    for (uint64_t seq = 3; !stop; seq += 2) {
      EXPECT_THAT(log_->Append({NoteOf(seq, "a", 500), NoteOf(seq + 1, "a", 500)}), IsOk());
    }
  });
  uint64_t last = 0;
  for (int i = 0; i < 5; ++i) {
    const auto info = Backup(State(), Target(Join("backup", i).c_str()));
    ASSERT_THAT(info, IsOk());
    ASSERT_THAT(Restore(Target(Join("backup", i).c_str()), Target(Join("restored", i).c_str())), IsOk());
    const auto log = OpenLog(Target(Join("restored", i).c_str()));
    EXPECT_EQ(Seqs(*log).size(), info->last_seq);
    EXPECT_EQ(info->last_seq % 2, 0u);
    EXPECT_GE(info->last_seq, last);
    last = info->last_seq;
  }
  stop = true;
  writer.join();
  EXPECT_GT(last, 2u);
}

TEST_F(BackupTest, DamagedOrIncompleteBackupIsRefused) {
  ASSERT_THAT(Backup(State(), Target("backup")), IsOk());
  const auto blob = Target("backup") / "cas" / digest_.substr(7, 2) / digest_.substr(7);
  std::filesystem::permissions(blob, std::filesystem::perms::owner_write, std::filesystem::perm_options::add);
  std::ofstream(blob) << "An artifact";
  EXPECT_THAT(Restore(Target("backup"), Target("r1")), StatusCodeIs(absl::StatusCode::kDataLoss));
  EXPECT_TRUE(std::filesystem::is_empty(Target("r1")));  // so that a mended backup can be restored there
  std::filesystem::remove(blob);
  EXPECT_THAT(Restore(Target("backup"), Target("r2")), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("0 blobs")));
  std::filesystem::remove(Target("backup") / "backup.json");
  EXPECT_THAT(Restore(Target("backup"), Target("r3")), StatusCodeIs(absl::StatusCode::kFailedPrecondition));
  EXPECT_THAT(Backup(Target("nothing"), Target("b2")), StatusCodeIs(absl::StatusCode::kFailedPrecondition));
}

}  // namespace
}  // namespace refinery::store
