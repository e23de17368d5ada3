#include "server/store/blob_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>

#include "server/store/artifacts.h"
#include "server/store/attempt_logs.h"
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

class BlobStoreTest : public ::testing::Test {
 protected:
  void SetUp() override { Reopen(); }
  void Reopen() {
    auto store = BlobStore::Open(folder_.path());
    ASSERT_THAT(store, IsOk());
    store_ = *std::move(store);
  }
  std::filesystem::path BlobFile(const std::string& digest) {
    return folder_.path() / "cas" / digest.substr(7, 2) / digest.substr(7);
  }

  TempFolder folder_;
  std::unique_ptr<BlobStore> store_;
};

TEST_F(BlobStoreTest, StoresUnderTheDigest) {
  const auto digest = store_->Put("hello\n");
  // Oracle: printf 'hello\n' | sha256sum
  ASSERT_THAT(digest, IsOkAndHolds("sha256:5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03"));
  EXPECT_TRUE(std::filesystem::exists(BlobFile(*digest)));
  EXPECT_THAT(store_->Get(*digest), IsOkAndHolds("hello\n"));
  EXPECT_EQ(store_->total_blobs(), 1);
  EXPECT_EQ(store_->total_bytes(), 6);
  Reopen();
  EXPECT_EQ(store_->total_bytes(), 6);
  EXPECT_THAT(store_->Get(DigestOf("other")), StatusCodeIs(absl::StatusCode::kNotFound));
  EXPECT_THAT(store_->Get("sha256:../../etc"), StatusCodeIs(absl::StatusCode::kInvalidArgument));
}

TEST_F(BlobStoreTest, EmptyBlob) {
  ASSERT_THAT(store_->Put(""), IsOk());
  EXPECT_THAT(store_->Get(DigestOf("")), IsOkAndHolds(""));
}

// Goal: an upload that was cut goes on where it stopped, also in another process.
TEST_F(BlobStoreTest, TornUploadIsResumed) {
  const std::string bytes(3'000'000, 'z');
  const std::string digest = DigestOf(bytes);
  {
    auto upload = store_->StartUpload(digest, bytes.size(), 0);
    ASSERT_THAT(upload, IsOk());
    ASSERT_THAT((*upload)->Write(0, bytes.substr(0, 1'234'567)), IsOk());
  }
  Reopen();
  EXPECT_FALSE(store_->Contains(digest));
  EXPECT_EQ(store_->PartialSize(digest), 1'234'567);
  EXPECT_THAT(store_->StartUpload(digest, bytes.size(), 0), StatusIs(absl::StatusCode::kOutOfRange, HasSubstr("1234567")));
  auto upload = store_->StartUpload(digest, bytes.size(), 1'234'567);
  ASSERT_THAT(upload, IsOk());
  EXPECT_THAT((*upload)->Finish(), StatusCodeIs(absl::StatusCode::kOutOfRange));  // too early
  ASSERT_THAT((*upload)->Write(1'234'567, bytes.substr(1'234'567)), IsOk());
  ASSERT_THAT((*upload)->Finish(), IsOk());
  EXPECT_EQ(store_->PartialSize(digest), 0);
  EXPECT_THAT(store_->Get(digest), IsOkAndHolds(bytes));
}

// Goal: bytes that are not what they are called never become a blob.
TEST_F(BlobStoreTest, WrongBytesAreDropped) {
  const std::string digest = DigestOf("right");
  auto upload = store_->StartUpload(digest, 5, 0);
  ASSERT_THAT((*upload)->Write(0, "wrong"), IsOk());
  EXPECT_THAT((*upload)->Finish(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(DigestOf("wrong"))));
  EXPECT_FALSE(store_->Contains(digest));
  EXPECT_EQ(store_->PartialSize(digest), 0);
}

// Goal: when the torn part is what is wrong, the sender is told to start again rather than that its bytes are bad.
TEST_F(BlobStoreTest, DamagedPartialUploadStartsAgain) {
  const std::string digest = DigestOf("right");
  ASSERT_THAT((*store_->StartUpload(digest, 5, 0))->Write(0, "wr"), IsOk());
  {
    auto upload = store_->StartUpload(digest, 5, 2);
    ASSERT_THAT((*upload)->Write(2, "ght"), IsOk());
    EXPECT_THAT((*upload)->Finish(), StatusCodeIs(absl::StatusCode::kAborted));
  }
  ASSERT_THAT((*store_->StartUpload(digest, 5, 0))->Write(0, "xx"), IsOk());
  EXPECT_THAT(store_->Put("right"), IsOk());  // a torn file does not stand in the way of our own blobs either
}

TEST_F(BlobStoreTest, MoreBytesThanAnnouncedAreRefused) {
  auto upload = store_->StartUpload(DigestOf("abc"), 3, 0);
  EXPECT_THAT((*upload)->Write(0, "abcd"), StatusCodeIs(absl::StatusCode::kOutOfRange));
  EXPECT_THAT((*upload)->Write(1, "b"), StatusCodeIs(absl::StatusCode::kOutOfRange));
}

// Goal: a dead connection's upload cannot block the next one.
TEST_F(BlobStoreTest, LaterUploadTakesOver) {
  const std::string digest = DigestOf("abcdef");
  auto first = store_->StartUpload(digest, 6, 0);
  ASSERT_THAT((*first)->Write(0, "abc"), IsOk());
  auto second = store_->StartUpload(digest, 6, 3);
  ASSERT_THAT(second, IsOk());
  EXPECT_THAT((*first)->Write(3, "def"), StatusCodeIs(absl::StatusCode::kAborted));
  ASSERT_THAT((*second)->Write(3, "def"), IsOk());
  ASSERT_THAT((*second)->Finish(), IsOk());
  EXPECT_THAT(store_->Get(digest), IsOkAndHolds("abcdef"));
}

// Goal: a flipped bit on disk is noticed when the blob is read, and the blob then counts as missing.
TEST_F(BlobStoreTest, DamageIsFoundOnRead) {
  const std::string digest = *store_->Put("some bytes");
  std::filesystem::permissions(BlobFile(digest), std::filesystem::perms::owner_all);
  std::fstream(BlobFile(digest), std::ios::in | std::ios::out) << 'S';
  EXPECT_THAT(store_->Get(digest), StatusCodeIs(absl::StatusCode::kDataLoss));
  EXPECT_FALSE(store_->Contains(digest));
  ASSERT_THAT(store_->Put("some bytes"), IsOk());
  EXPECT_THAT(store_->Get(digest), IsOkAndHolds("some bytes"));
}

TEST_F(BlobStoreTest, ReaderStartsAnywhere) {
  const std::string digest = *store_->Put("0123456789");
  auto reader = store_->OpenReader(digest, 7);
  ASSERT_THAT(reader, IsOk());
  EXPECT_THAT((*reader)->Read(2), IsOkAndHolds("78"));
  EXPECT_THAT((*reader)->Read(2), IsOkAndHolds("9"));
  EXPECT_THAT((*reader)->Read(2), IsOkAndHolds(""));
  EXPECT_THAT(store_->OpenReader(digest, 11), StatusCodeIs(absl::StatusCode::kOutOfRange));
}

TEST_F(BlobStoreTest, ArtifactIsCompleteOnlyWithAllItsFiles) {
  const auto ref = PutArtifact(*store_, "report", {{"b.txt", "two"}, {"a/a.txt", "one1"}});
  ASSERT_THAT(ref, IsOk());
  EXPECT_EQ(ref->size(), 7);
  EXPECT_THAT(CheckComplete(*store_, ref->digest()), IsOkAndHolds(7u));
  EXPECT_THAT(ReadArtifactFile(*store_, ref->digest(), "b.txt"), IsOkAndHolds("two"));
  EXPECT_THAT(ReadArtifactFile(*store_, ref->digest(), "c"), StatusCodeIs(absl::StatusCode::kNotFound));
  std::filesystem::remove(BlobFile(DigestOf("two")));
  EXPECT_THAT(CheckComplete(*store_, ref->digest()), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("b.txt")));
  EXPECT_THAT(CheckComplete(*store_, DigestOf("x")), StatusCodeIs(absl::StatusCode::kFailedPrecondition));
  EXPECT_THAT(CheckComplete(*store_, DigestOf("one1")), StatusCodeIs(absl::StatusCode::kDataLoss));
}

// Goal: repeated and overlapping parts of a log are stored once, gaps are visible, and a restart goes on.
TEST(AttemptLogsTest, KeepsEachByteOnce) {
  TempFolder folder;
  {
    AttemptLogs logs(folder.path());
    ASSERT_THAT(logs.Append("j", "trial/0/replicate/1", 2, 0, "hello "), IsOk());
    ASSERT_THAT(logs.Append("j", "trial/0/replicate/1", 2, 0, "hello "), IsOk());
    ASSERT_THAT(logs.Append("j", "trial/0/replicate/1", 2, 3, "lo world\n"), IsOk());
  }
  AttemptLogs logs(folder.path());
  const auto list = logs.List("j");
  ASSERT_EQ(list.size(), 1);
  EXPECT_EQ(list[0].path, "trial/0/replicate/1");
  EXPECT_EQ(list[0].attempt, 2);
  EXPECT_THAT(logs.Read("j", list[0].path, 2, 0, 100), IsOkAndHolds("hello world\n"));
  ASSERT_THAT(logs.Append("j", list[0].path, 2, 100, "end\n"), IsOk());
  const auto text = logs.Read("j", list[0].path, 2, 12, 1000);
  ASSERT_THAT(text, IsOk());
  EXPECT_EQ(text->size(), 100 - 12 + 4);
  EXPECT_THAT(*text, HasSubstr("88 bytes of the log are missing"));
  EXPECT_TRUE(text->ends_with("\nend\n"));
  EXPECT_THAT(logs.Read("j", "nothing", 1, 0, 10), IsOkAndHolds(""));
}

using std::chrono::milliseconds;

// Goal: a blob goes only when nothing referred to it for the whole grace.
TEST_F(BlobStoreTest, CollectsInTwoPhases) {
  const std::string kept = *store_->Put("kept");
  const std::string lost = *store_->Put("lost");
  const auto is_live = [&](const std::string& digest) { return digest == kept; };
  const auto sweep = [&](int now_ms) { return *store_->Sweep(is_live, milliseconds(now_ms), milliseconds(1000)); };
  EXPECT_EQ(sweep(5000).candidates, 1);
  EXPECT_EQ(sweep(5999).deleted, 0);
  EXPECT_EQ(store_->total_blobs(), 2);
  const auto swept = sweep(6000);
  EXPECT_EQ(swept.deleted, 1);
  EXPECT_EQ(swept.deleted_bytes, 4);
  EXPECT_THAT(store_->Get(lost), StatusCodeIs(absl::StatusCode::kNotFound));
  EXPECT_THAT(store_->Get(kept), IsOkAndHolds("kept"));
  EXPECT_EQ(store_->total_bytes(), 4);
  EXPECT_THAT(store_->Put("lost"), IsOkAndHolds(lost));  // and can come again
}

// Goal: whoever asks for a candidate saves it: its grace starts anew.  Method: every way of asking, at the last moment.
TEST_F(BlobStoreTest, AskingForACandidateSavesIt) {
  const std::string digest = *store_->Put("wanted");
  const auto nothing = [](const std::string&) { return false; };
  const auto sweep = [&](int now_ms) { return store_->Sweep(nothing, milliseconds(now_ms), milliseconds(100))->deleted; };
  EXPECT_EQ(sweep(0), 0);
  EXPECT_TRUE(store_->Contains(digest));
  EXPECT_EQ(sweep(100), 0);
  EXPECT_THAT(store_->OpenReader(digest, 0), IsOk());
  EXPECT_EQ(sweep(200), 0);
  EXPECT_THAT(store_->Put("wanted"), IsOk());
  EXPECT_EQ(sweep(300), 0);
  EXPECT_EQ(sweep(400), 1);
}

TEST_F(BlobStoreTest, AbandonedUploadsGoWithTheirGrace) {
  const std::string digest = DigestOf("0123456789");
  {
    auto upload = store_->StartUpload(digest, 10, 0);
    ASSERT_THAT((*upload)->Write(0, "01234"), IsOk());
  }
  const auto nothing = [](const std::string&) { return false; };
  ASSERT_THAT(store_->Sweep(nothing, milliseconds(0), std::chrono::hours(1)), IsOk());
  EXPECT_EQ(store_->PartialSize(digest), 5);
  std::filesystem::last_write_time(folder_.path() / "tmp" / (digest.substr(7) + ".partial"),
                                   std::filesystem::file_time_type::clock::now() - std::chrono::hours(2));
  EXPECT_EQ(store_->Sweep(nothing, milliseconds(0), std::chrono::hours(1))->deleted, 1);
  EXPECT_EQ(store_->PartialSize(digest), 0);
}

// Goal: a disk is full when its share and its bytes say so, both.  Method: each side of each bound.
TEST(DiskTest, MarksNeedBothBounds) {
  constexpr uint64_t kGib = uint64_t{1} << 30;
  const auto passed = [](const DiskMark& mark, uint64_t total_gib, double free_gib) {
    return mark.IsPassed({.total_bytes = total_gib * kGib, .free_bytes = static_cast<uint64_t>(free_gib * kGib)});
  };
  EXPECT_FALSE(passed(kDiskFull, 4000, 200));   // 95 % used, room for days
  EXPECT_FALSE(passed(kDiskFull, 1000, 20));    // 98 %, just enough
  EXPECT_TRUE(passed(kDiskFull, 1000, 19.99));
  EXPECT_FALSE(passed(kDiskFull, 100, 10.01));  // little, but a small disk
  EXPECT_TRUE(passed(kDiskFull, 100, 9.99));
  EXPECT_FALSE(passed(kDiskReadOnly, 1000, 5));
  EXPECT_TRUE(passed(kDiskReadOnly, 1000, 4.99));
  EXPECT_FALSE(passed(kDiskReadOnly, 100, 3.01));
  EXPECT_TRUE(passed(kDiskReadOnly, 100, 2.99));
  EXPECT_TRUE(passed(kDiskReadOnly, 1, 0));
  EXPECT_FALSE(passed({}, 1, 0));  // no mark at all
  EXPECT_EQ(kDiskFull.Words(), "more than 90 % used and less than 20 GiB free");
}

// Goal: above the mark nothing is taken in and everything can be read; below it, all is as before.
TEST(DiskTest, FullDiskIsReadOnly) {
  TempFolder folder;
  double used = 0.5;
  auto store = *BlobStore::Open(folder.path(), {.space_of = [&](const std::filesystem::path&) -> StatusOr<DiskSpace> {
    return DiskSpace{.total_bytes = uint64_t{1} << 36, .free_bytes = static_cast<uint64_t>((1 - used) * (uint64_t{1} << 36))};
  }});
  const auto digest = store->Put("before");
  ASSERT_THAT(digest, IsOk());
  used = 0.98;
  EXPECT_THAT(store->Put("more"), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("98 % full")));
  EXPECT_THAT(store->Get(*digest), IsOkAndHolds("before"));
  EXPECT_THAT(store->Put("before"), IsOk());  // it is there already
  used = 0.96;
  EXPECT_THAT(store->Put("more"), IsOk());
}

}  // namespace
}  // namespace refinery::store
