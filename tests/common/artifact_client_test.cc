// Tests of common/artifact_client against an in-memory store that cuts transfers, with the store's own bytes as oracle.

#include "common/artifact_client.h"

#include <stdlib.h>

#include <atomic>
#include <fstream>
#include <thread>

#include "common/channel.h"
#include "common/files.h"
#include "tests/support/fake_coordinator.h"
#include "tests/support/status_matchers.h"

namespace refinery {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;
using testing::IsOk;
using testing::StatusCodeIs;
using testing::StatusIs;

class ArtifactClientTest : public ::testing::Test {
 protected:
  ArtifactClientTest() : client_(channel_, FastRetries()) {
    std::string name = (std::filesystem::temp_directory_path() / "artifact-client-XXXXXX").string();
    folder_ = ::mkdtemp(name.data());
  }
  ~ArtifactClientTest() override { std::filesystem::remove_all(folder_); }

  static ArtifactClient::Options FastRetries() {
    return {.max_attempts = 4,
            .initial_backoff = std::chrono::milliseconds(5),
            .max_backoff = std::chrono::milliseconds(20)};
  }

  void Write(const std::string& path, const std::string& text) {
    ASSERT_THAT(WriteFileAtomically(folder_ / path, text), IsOk());
  }

  // Pseudo-random bytes, so that a shifted or repeated chunk changes the content.
  static std::string Bytes(size_t size) {
    std::string bytes(size, '\0');
    uint32_t state = 12345;
    for (char& byte : bytes) {
      state = state * 1664525 + 1013904223;
      byte = static_cast<char>(state >> 24);
    }
    return bytes;
  }

  testing::FakeCoordinator coordinator_;
  std::shared_ptr<grpc::Channel> channel_ = MakeChannel(coordinator_.address());
  ArtifactClient client_;
  std::filesystem::path folder_;
};

// Goal: what is uploaded is in the store under the digest of its manifest, and a download gives the same files.
TEST_F(ArtifactClientTest, FolderTravelsBothWays) {
  const std::map<std::string, std::string> files = {
      {"a.txt", "hello"}, {"deep/er/b.bin", Bytes(3'000'000)}, {"empty", ""}};
  for (const auto& [path, text] : files) Write("up/" + path, text);
  auto uploaded = client_.UploadFolder(folder_ / "up", "adapter");
  ASSERT_THAT(uploaded, IsOk());
  EXPECT_EQ(uploaded->name(), "adapter");
  EXPECT_EQ(uploaded->size(), 3'000'005u);
  EXPECT_EQ(coordinator_.artifacts.Folder(uploaded->digest()), files);
  EXPECT_THAT(FolderDigest(folder_ / "up"), testing::IsOkAndHolds(uploaded->digest()));

  ASSERT_THAT(client_.DownloadFolder(uploaded->digest(), folder_ / "down"), IsOk());
  for (const auto& [path, text] : files) EXPECT_THAT(ReadFile(folder_ / "down" / path), testing::IsOkAndHolds(text));
  EXPECT_FALSE(std::filesystem::exists(folder_ / "down.partial"));
}

// Goal: an upload that is cut goes on at the offset.  Method: each cut comes after 1 MiB; 5 MB arrive although no single
// transfer may carry more than 1 MiB + one chunk, and no byte is taken twice.
TEST_F(ArtifactClientTest, CutUploadsResume) {
  std::string bytes = Bytes(5'000'000);
  Write("up/data", bytes);
  coordinator_.artifacts.CutAfter(1 << 20, 100);
  auto uploaded = client_.UploadFolder(folder_ / "up", "data");
  ASSERT_THAT(uploaded, IsOk());
  EXPECT_EQ(coordinator_.artifacts.Folder(uploaded->digest())["data"], bytes);
  EXPECT_LT(coordinator_.artifacts.bytes_written(), 5'000'200u);
}

// Goal: the same for downloads, also from bytes that an earlier process left.
TEST_F(ArtifactClientTest, CutDownloadsResume) {
  std::string bytes = Bytes(5'000'000);
  std::string digest = coordinator_.artifacts.PutFolder({{"data", bytes}});
  Write("down.partial/data", bytes.substr(0, 1'234'567));
  coordinator_.artifacts.CutAfter(1 << 20, 100);
  ASSERT_THAT(client_.DownloadFolder(digest, folder_ / "down"), IsOk());
  EXPECT_THAT(ReadFile(folder_ / "down" / "data"), testing::IsOkAndHolds(bytes));
}

// Goal: wrong bytes left by an earlier process do not stand in the way.
TEST_F(ArtifactClientTest, WrongPartialBytesAreReplaced) {
  std::string digest = coordinator_.artifacts.PutFolder({{"data", "right"}});
  Write("down.partial/data", "wro");
  ASSERT_THAT(client_.DownloadFolder(digest, folder_ / "down"), IsOk());
  EXPECT_THAT(ReadFile(folder_ / "down" / "data"), testing::IsOkAndHolds(std::string("right")));
}

// Goal: bytes that do not have their digest never reach the target.
TEST_F(ArtifactClientTest, CorruptDownloadsAreRefused) {
  std::string digest = coordinator_.artifacts.PutFolder({{"data", Bytes(100'000)}});
  coordinator_.artifacts.CorruptReads(true);
  EXPECT_THAT(client_.DownloadFolder(digest, folder_ / "down"), StatusCodeIs(absl::StatusCode::kDataLoss));
  EXPECT_FALSE(std::filesystem::exists(folder_ / "down"));
}

// Goal: what the store has is not sent again.
TEST_F(ArtifactClientTest, KnownBlobsAreNotSent) {
  Write("up/data", Bytes(1'000'000));
  ASSERT_THAT(client_.UploadFolder(folder_ / "up", "data"), IsOk());
  uint64_t before = coordinator_.artifacts.bytes_written();
  ASSERT_THAT(client_.UploadFolder(folder_ / "up", "data"), IsOk());
  EXPECT_EQ(coordinator_.artifacts.bytes_written(), before);
}

// Goal: a transfer that makes no progress ends with UNAVAILABLE, one that is cancelled with CANCELLED.
TEST_F(ArtifactClientTest, GivesUp) {
  Write("up/data", "x");
  coordinator_.Stop();
  EXPECT_THAT(client_.UploadFolder(folder_ / "up", "data"), StatusIs(absl::StatusCode::kUnavailable, HasSubstr("gave up")));
  ArtifactClient::Options options = FastRetries();
  options.cancelled = [] { return true; };
  ArtifactClient cancelled(channel_, options);
  EXPECT_THAT(cancelled.UploadFolder(folder_ / "up", "data"), StatusCodeIs(absl::StatusCode::kCancelled));
}

// Goal: a coordinator that is away, full or busy is waited for where that is wanted, and a full disk is told at once elsewhere.
// Method: more refusals, and a longer absence, than the four tries of this client last for.
TEST_F(ArtifactClientTest, WaitsForTheCoordinator) {
  const grpc::Status full(grpc::StatusCode::RESOURCE_EXHAUSTED, "moves 64 blobs already");
  Write("up/data", Bytes(100'000));
  coordinator_.artifacts.Refuse(full, 1);
  EXPECT_THAT(client_.UploadFolder(folder_ / "up", "data"), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("64 blobs")));

  std::atomic<int> asked = 0;
  ArtifactClient::Options options = FastRetries();
  options.patient = [&](const Status&) { return ++asked < 1'000; };
  ArtifactClient patient(channel_, options);
  coordinator_.artifacts.Refuse(full, 20);
  auto uploaded = patient.UploadFolder(folder_ / "up", "data");
  ASSERT_THAT(uploaded, IsOk());
  EXPECT_EQ(asked, 20);
  coordinator_.artifacts.Refuse(full, 20);
  ASSERT_THAT(patient.DownloadFolder(uploaded->digest(), folder_ / "down"), IsOk());
  EXPECT_EQ(asked, 40);

  coordinator_.Stop();
  asked = 0;
  std::thread returns([&] {
    while (asked < 5) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    coordinator_.Start();
  });
  EXPECT_THAT(patient.DownloadFolder(uploaded->digest(), folder_ / "again"), IsOk());
  asked = 1'000;
  returns.join();

  coordinator_.artifacts.Refuse(full, 20);
  EXPECT_THAT(patient.DownloadFolder(uploaded->digest(), folder_ / "third"), StatusCodeIs(absl::StatusCode::kResourceExhausted));
}

// Goal: what is too large for its reader is no reason to wait, although the code is that of a full coordinator.
TEST_F(ArtifactClientTest, DoesNotWaitForItself) {
  const std::string digest = coordinator_.artifacts.PutFolder({{"rows", "0123456789"}});
  ArtifactClient::Options options = FastRetries();
  options.patient = [](const Status&) { return true; };
  EXPECT_THAT(ArtifactClient(channel_, options).ReadArtifactFile(digest, "rows", 3),
              StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("larger than 3 bytes")));
}

// Goal: one file under another name, and reading one file of an artifact.
TEST_F(ArtifactClientTest, SingleFiles) {
  Write("seeds.jsonl", "{}\n");
  auto uploaded = client_.UploadFile(folder_ / "seeds.jsonl", "rows.jsonl", "seeds");
  ASSERT_THAT(uploaded, IsOk());
  EXPECT_THAT(FileArtifactDigest(folder_ / "seeds.jsonl", "rows.jsonl"), testing::IsOkAndHolds(uploaded->digest()));
  EXPECT_THAT(client_.ReadArtifactFile(uploaded->digest(), "rows.jsonl", 100), testing::IsOkAndHolds(std::string("{}\n")));
  EXPECT_THAT(client_.ReadArtifactFile(uploaded->digest(), "other", 100), StatusCodeIs(absl::StatusCode::kNotFound));
  EXPECT_THAT(client_.ReadArtifactFile(uploaded->digest(), "rows.jsonl", 1),
              StatusCodeIs(absl::StatusCode::kResourceExhausted));
}

}  // namespace
}  // namespace refinery
