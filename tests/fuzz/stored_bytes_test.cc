// What lies on the coordinator's disk, damaged: events, plans within them, snapshots, the database's file, backup.json. Whatever
// it says, reading it ends with a status or with a state that works; damage that a digest covers is always found.

#include <gmock/gmock.h>
#include <google/protobuf/io/gzip_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <gtest/gtest.h>

#include <fstream>

#include "common/files.h"
#include "refinery/v1/snapshot.pb.h"
#include "server/jobs/core.h"
#include "server/store/backup.h"
#include "server/store/blob_store.h"
#include "server/store/event_log.h"
#include "server/store/snapshots.h"
#include "tests/fuzz/mutator.h"
#include "tests/server/store/temp_folder.h"
#include "tests/support/status_matchers.h"

namespace refinery {
namespace {

using fuzz::Mutator;
using jobs::Core;
using jobs::Events;
using refinery::testing::IsOk;
using refinery::testing::TempFolder;

constexpr char kRecipe[] = "recipe";  // was checked when it was taken in

std::string Vector(const std::string& name) {
  return *ReadFile(std::filesystem::path(REFINERY_SOURCE_DIR) / "tests/vectors/event_log" / name);
}

// Each event stands behind its length, four bytes, lowest first (tests/server/jobs/upgrade_test.cc).
std::vector<std::string> Payloads(const std::string& bytes) {
  std::vector<std::string> payloads;
  for (size_t at = 0; at + 4 <= bytes.size();) {
    size_t size = 0;
    for (int i = 0; i < 4; ++i) size |= static_cast<size_t>(static_cast<unsigned char>(bytes[at + i])) << (8 * i);
    payloads.push_back(bytes.substr(at + 4, size));
    at += 4 + size;
  }
  return payloads;
}

Core NewCore() { return Core({.code_version = "test"}); }

// Everything a coordinator does with a state it has read; and the state comes back from its own snapshot.
void Use(Core& core) {
  const std::string snapshot = core.Snapshot();
  Core again = NewCore();
  ASSERT_THAT(again.Restore(snapshot), IsOk()) << Dump(core.state());
  EXPECT_EQ(again.Snapshot(), snapshot);
  Events events;
  jobs::Now now{.steady = std::chrono::milliseconds(1'000), .unix_ms = 1'700'000'000'000};
  core.StartGrace(now, &events);
  for (int i = 0; i < 3; ++i) {
    now.steady += std::chrono::seconds(40);
    core.Tick(now, &events);
    for (const Core::ReadyTask& task : core.ReadyTasks(now, 4)) (void)core.Grant(task.job, task.path, "w", "i", now, &events);
  }
  for (const std::string& id : core.state().order) {
    (void)jobs::ToProto(core.state().jobs.at(id), true, now);
    (void)core.CancelJob(id, "enough", now, &events);
    (void)core.RetryJob(id, "again", now, &events);
  }
}

// Reads `payloads`; false when one is refused.
bool ReplayAll(const std::vector<std::string>& payloads) {
  Core core = NewCore();
  for (const std::string& payload : payloads) {
    v1::Event event;
    if (!event.ParseFromString(payload)) return false;  // the store says DATA_LOSS
    const Status status = core.Replay(event);
    if (status.ok()) continue;
    EXPECT_TRUE(absl::IsDataLoss(status)) << status;
    return false;
  }
  Use(core);
  return true;
}

TEST(StoredBytesTest, DamagedEventsAreRefusedOrWork) {
  for (const char* name : {"v0.bin", "v1.bin"}) {
    const std::vector<std::string> good = Payloads(Vector(name));
    ASSERT_TRUE(ReplayAll(good));
    int accepted = 0;
    for (uint32_t seed = 1; seed <= 1'500 && !HasFailure(); ++seed) {
      SCOPED_TRACE(Join(name, " seed ", seed));
      Mutator mutator(seed);
      std::vector<std::string> payloads = good;
      std::string& payload = payloads[mutator.Below(payloads.size())];
      if (seed % 4 == 0) {
        payload = mutator.Bytes(payload);
      } else {
        v1::Event event;
        ASSERT_TRUE(event.ParseFromString(payload));
        mutator.Change(&event, kRecipe);
        payload = event.SerializeAsString();
      }
      accepted += ReplayAll(payloads);
    }
    EXPECT_GT(accepted, 100) << name;  // or nothing behind the first check was tested
  }
}

// Events left out, doubled and in another order, numbered as if they were right.
TEST(StoredBytesTest, EventsInAnotherOrderAreRefusedOrWork) {
  const std::vector<std::string> good = Payloads(Vector("v1.bin"));
  int accepted = 0;
  for (uint32_t seed = 1; seed <= 1'000 && !HasFailure(); ++seed) {
    SCOPED_TRACE(Join("seed ", seed));
    Mutator mutator(seed);
    std::vector<std::string> payloads = good;
    const size_t at = mutator.Below(payloads.size()), other = mutator.Below(payloads.size());
    if (seed % 3 == 0) payloads.erase(payloads.begin() + static_cast<std::ptrdiff_t>(at));
    if (seed % 3 == 1) payloads.insert(payloads.begin() + static_cast<std::ptrdiff_t>(other), good[at]);
    if (seed % 3 == 2) std::swap(payloads[at], payloads[other]);
    for (size_t i = 0; i < payloads.size(); ++i) {
      v1::Event event;
      ASSERT_TRUE(event.ParseFromString(payloads[i]));
      event.set_seq(i + 1);
      payloads[i] = event.SerializeAsString();
    }
    accepted += ReplayAll(payloads);
  }
  EXPECT_GT(accepted, 20);
}

std::string Zip(const std::string& bytes) {
  std::string zipped;
  {
    google::protobuf::io::StringOutputStream stream(&zipped);
    google::protobuf::io::GzipOutputStream zip(&stream);
    google::protobuf::io::CodedOutputStream coded(&zip);
    coded.WriteString(bytes);
  }
  return zipped;
}

std::string Unzip(const std::string& zipped) {
  google::protobuf::io::ArrayInputStream stream(zipped.data(), static_cast<int>(zipped.size()));
  google::protobuf::io::GzipInputStream zip(&stream);
  std::string bytes;
  const void* piece = nullptr;
  for (int size = 0; zip.Next(&piece, &size);) bytes.append(static_cast<const char*>(piece), static_cast<size_t>(size));
  return bytes;
}

TEST(StoredBytesTest, DamagedPlansAreRefusedOrWork) {
  const std::vector<std::string> good = Payloads(Vector("v1.bin"));
  v1::Event created;
  ASSERT_TRUE(created.ParseFromString(good.front()));
  v1::StoredPlan plan;
  ASSERT_TRUE(plan.ParseFromString(Unzip(created.job_created().plan())));
  ASSERT_GT(plan.tasks_size(), 5);
  int accepted = 0;
  for (uint32_t seed = 1; seed <= 1'500 && !HasFailure(); ++seed) {
    SCOPED_TRACE(Join("seed ", seed));
    Mutator mutator(seed);
    std::vector<std::string> payloads = good;
    v1::Event event = created;
    v1::StoredPlan changed = plan;
    mutator.Change(&changed);
    event.mutable_job_created()->set_plan(seed % 4 == 0 ? mutator.Bytes(created.job_created().plan()) : Zip(changed.SerializeAsString()));
    payloads.front() = event.SerializeAsString();
    accepted += ReplayAll(payloads);
  }
  EXPECT_GT(accepted, 100);
}

// The digest of the file finds what is damaged; this is about what a digest of wrong bytes would let through.
TEST(StoredBytesTest, DamagedSnapshotsAreRefusedOrWork) {
  const std::string good = Vector("v1.snapshot");
  v1::Snapshot snapshot;
  ASSERT_TRUE(snapshot.ParseFromString(good));
  int accepted = 0;
  for (uint32_t seed = 1; seed <= 2'000 && !HasFailure(); ++seed) {
    SCOPED_TRACE(Join("seed ", seed));
    Mutator mutator(seed);
    v1::Snapshot changed = snapshot;
    mutator.Change(&changed, kRecipe);
    Core core = NewCore();
    const Status status = core.Restore(seed % 4 == 0 ? mutator.Bytes(good) : changed.SerializeAsString());
    if (status.ok()) {
      ++accepted;
      Use(core);
    } else {
      EXPECT_TRUE(absl::IsDataLoss(status)) << status;
    }
  }
  EXPECT_GT(accepted, 100);
}

TEST(StoredBytesTest, NoDamageToASnapshotFilePasses) {
  TempFolder folder;
  ASSERT_THAT(store::WriteSnapshot(folder.path(), 31, Vector("v1.snapshot")), IsOk());
  const auto file = folder.path() / "snapshots" / "00000000000000000031.snapshot";
  const std::string good = *ReadFile(file);
  for (uint32_t seed = 1; seed <= 500; ++seed) {
    const std::string bytes = Mutator(seed).Bytes(good);
    if (bytes == good) continue;
    std::ofstream(file, std::ios::binary | std::ios::trunc) << bytes;
    EXPECT_FALSE(store::ReadSnapshotFile(folder.path(), 31).ok()) << "seed " << seed;
    EXPECT_FALSE(store::ReadNewestSnapshot(folder.path(), 100).ok()) << "seed " << seed;
  }
}

// SQLite's pages carry no digests, so a changed number may pass; but every event that is read back is whole and in order.
TEST(StoredBytesTest, DamagedDatabasesAreRefusedOrRead) {
  TempFolder folder;
  {
    auto log = store::EventLog::Open(folder.path());
    ASSERT_THAT(log, IsOk());
    std::vector<v1::Event> events;
    for (const std::string& payload : Payloads(Vector("v1.bin"))) ASSERT_TRUE(events.emplace_back().ParseFromString(payload));
    ASSERT_THAT((*log)->Append(events), IsOk());
  }
  const std::string good = *ReadFile(folder.path() / "refinery.db");
  int opened = 0;
  for (uint32_t seed = 1; seed <= 250 && !HasFailure(); ++seed) {
    SCOPED_TRACE(Join("seed ", seed));
    Mutator mutator(seed);
    std::string bytes = good;
    // Most of the file is payload: half of the damage goes to the first page, where the structure is.
    if (seed % 2 == 0) {
      bytes = mutator.Bytes(good);
    } else {
      for (int i = 0; i < 3; ++i) bytes[mutator.Below(4096)] = static_cast<char>(mutator.Below(256));
    }
    TempFolder copy;
    std::ofstream(copy.path() / "refinery.db", std::ios::binary) << bytes;
    uint64_t last = 0;
    const auto visit = [&](const v1::Event& event) {
      EXPECT_EQ(event.seq(), ++last);
      return absl::OkStatus();
    };
    if (auto log = store::EventLog::Open(copy.path()); log.ok()) {
      ++opened;
      const Status status = (*log)->Replay(visit);
      if (status.ok()) {
        EXPECT_EQ(last, (*log)->last_seq());
      }
      (void)(*log)->Read("job-a", 0, 100);
      (void)(*log)->ResultOf("sha256:x");
    }
    (void)store::CheckEventLog(copy.path());
    (void)store::CopyEventLog(copy.path(), copy.path() / "copy.db");
  }
  EXPECT_GT(opened, 20);
}

TEST(StoredBytesTest, DamagedBackupInfoIsRefused) {
  TempFolder folder;
  const auto state = folder.path() / "state", backup = folder.path() / "backup";
  {
    ASSERT_THAT(CreateFolders(state), IsOk());
    auto log = store::EventLog::Open(state);
    ASSERT_THAT(log, IsOk());
  }
  const auto made = store::Backup(state, backup);
  ASSERT_THAT(made, IsOk());
  const std::string good = *ReadFile(backup / "backup.json");
  for (uint32_t seed = 1; seed <= 400 && !HasFailure(); ++seed) {
    const std::string bytes = Mutator(seed).Bytes(good, {"null", "-1", "1e999", "[[[[", "\"blobs\":", "{\"blobs\":{}}", "18446744073709551616"});
    SCOPED_TRACE(Join("seed ", seed, ": ", bytes.substr(0, 100)));
    std::ofstream(backup / "backup.json", std::ios::trunc) << bytes;
    const auto target = folder.path() / Join("restored", seed);
    const auto restored = store::Restore(backup, target);
    if (restored.ok()) {
      EXPECT_EQ(restored->blobs, made->blobs);  // what the text still says
      EXPECT_EQ(restored->last_seq, made->last_seq);
    } else {
      EXPECT_TRUE(absl::IsFailedPrecondition(restored.status())) << restored.status();
      EXPECT_FALSE(std::filesystem::exists(target / "refinery.db"));
    }
    std::error_code ignored;
    std::filesystem::remove_all(target, ignored);
  }
}

}  // namespace
}  // namespace refinery
