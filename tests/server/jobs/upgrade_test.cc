// Logs and snapshots of earlier versions, in tests/vectors/event_log/. They are never written again; a later version adds its own.
//
//   v0.bin   events without plan, code version and causes, as refineryd 0.1.0 wrote them before it kept the plan
//   v1.bin   events with them; v1.snapshot: the snapshot of the same state
//   v0.txt, v1.txt   what the states are, as Dump writes it today (REFINERY_WRITE_VECTORS=1 writes these two again, and whatever
//                    is missing)

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "tests/server/jobs/tiny_job.h"
#include "tests/support/status_matchers.h"

namespace refinery::jobs {
namespace {

using refinery::testing::CoreDriver;
using refinery::testing::IsOk;
using refinery::testing::StatusCodeIs;

const std::filesystem::path kFolder = std::filesystem::path(REFINERY_SOURCE_DIR) / "tests/vectors/event_log";

std::string ReadFile(const std::string& name) {
  std::ifstream file(kFolder / name, std::ios::binary);
  std::stringstream bytes;
  bytes << file.rdbuf();
  return bytes.str();
}

void WriteFile(const std::string& name, const std::string& bytes, bool again) {
  if (!again && std::filesystem::exists(kFolder / name)) return;
  std::ofstream(kFolder / name, std::ios::binary) << bytes;
}

// Each event behind its length, four bytes, lowest first.
std::string Pack(const Events& events) {
  std::string bytes;
  for (const v1::Event& event : events) {
    const std::string payload = event.SerializeAsString();
    for (int i = 0; i < 4; ++i) bytes += static_cast<char>(payload.size() >> (8 * i));
    bytes += payload;
  }
  return bytes;
}

Events Unpack(const std::string& bytes) {
  Events events;
  for (size_t at = 0; at + 4 <= bytes.size();) {
    size_t size = 0;
    for (int i = 0; i < 4; ++i) size |= static_cast<size_t>(static_cast<unsigned char>(bytes[at + i])) << (8 * i);
    v1::Event event;
    RF_CHECK(event.ParseFromString(bytes.substr(at + 4, size)));
    events.push_back(std::move(event));
    at += 4 + size;
  }
  return events;
}

// A life with most kinds of events; the job is in the middle of it at the end.
void Live(CoreDriver& driver, bool with_new_kinds) {
  RF_CHECK(driver.Create("job-a", "request-a").ok());
  v1::Lease lease = driver.RunUntil([](const v1::Lease& l) { return l.spec().has_train(); });
  v1::CommitCheckpointRequest checkpoint;
  *checkpoint.mutable_lease() = lease.token();
  checkpoint.set_step(10);
  checkpoint.mutable_checkpoint()->set_digest(DigestOf("checkpoint"));
  RF_CHECK(driver.core.CommitCheckpoint(checkpoint, driver.now, &driver.events).ok());
  driver.Wait(31'000);
  lease = driver.Grant("w2", "i2");
  RF_CHECK(driver.Complete(CoreDriver::Failure(lease, v1::NODE)).ok());
  driver.Wait(60'000);
  RF_CHECK(driver.Complete(CoreDriver::Failure(driver.Grant(), v1::NUMERIC)).ok());
  if (with_new_kinds) {
    v1::TenantPolicy tenant;
    tenant.set_tenant("default");
    tenant.set_max_leases(9);
    RF_CHECK(driver.core.SetTenant(tenant, driver.now, &driver.events).ok());
    v1::JobPolicy policy;
    policy.set_priority(3);
    RF_CHECK(driver.core.SetPolicy("job-a", policy, driver.now, &driver.events).ok());
    driver.Grant();
    RF_CHECK(driver.core.PauseJob("job-a", "", driver.now, &driver.events).ok());
    driver.Wait(61'000);
    RF_CHECK(driver.core.ResumeJob("job-a", "", driver.now, &driver.events).ok());
    RF_CHECK(driver.core.KillJob("job-a", "", driver.now, &driver.events).ok());
    RF_CHECK(driver.core.RetryJob("job-a", "", driver.now, &driver.events).ok());
  }
  RF_CHECK(driver.Create("job-b").ok());
  driver.Grant();
}

void WriteVectors() {
  if (std::getenv("REFINERY_WRITE_VECTORS") == nullptr) return;
  CoreDriver old;
  Live(old, false);
  for (v1::Event& event : old.events) {
    if (!event.has_job_created()) continue;
    event.mutable_job_created()->clear_plan();
    event.mutable_job_created()->clear_code_version();
  }
  WriteFile("v0.bin", Pack(old.events), false);
  CoreDriver now;
  Live(now, true);
  WriteFile("v1.bin", Pack(now.events), false);
  WriteFile("v1.snapshot", now.core.Snapshot(), false);
  for (const char* name : {"v0", "v1"}) {
    Core core(CoreDriver::WithVersion({}));
    for (const v1::Event& event : Unpack(ReadFile(Join(name, ".bin")))) RF_CHECK(core.Replay(event).ok());
    WriteFile(Join(name, ".txt"), Dump(core.state()), true);
  }
}

TEST(UpgradeTest, LogsOfEarlierVersionsGiveTheStateThatTheyGave) {
  WriteVectors();
  for (const char* name : {"v0", "v1"}) {
    const Events events = Unpack(ReadFile(Join(name, ".bin")));
    ASSERT_GT(events.size(), 20) << name;
    Core core(CoreDriver::WithVersion({}));
    for (const v1::Event& event : events) ASSERT_THAT(core.Replay(event), IsOk()) << name;
    EXPECT_EQ(Dump(core.state()), ReadFile(Join(name, ".txt"))) << name;
    // And it can go on from there.
    Events more;
    Now now{.steady = std::chrono::milliseconds(5)};
    core.StartGrace(now, &more);
    now.steady += std::chrono::milliseconds(1);
    EXPECT_FALSE(core.ReadyTasks({.steady = std::chrono::hours(1)}, 1).empty()) << name;
  }
}

TEST(UpgradeTest, SnapshotsOfEarlierVersionsGiveTheStateThatTheyGave) {
  Core core(CoreDriver::WithVersion({}));
  ASSERT_THAT(core.Restore(ReadFile("v1.snapshot")), IsOk());
  EXPECT_EQ(Dump(core.state()), ReadFile("v1.txt"));
}

// Goal: the stored plan decides, not today's planner.  Method: a plan in which one task was renamed and one added.
TEST(UpgradeTest, TheStoredPlanDecides) {
  const Events events = Unpack(ReadFile("v1.bin"));
  ASSERT_FALSE(events.empty());
  v1::Event event = events.front();
  event.mutable_job_created()->mutable_recipe()->mutable_data()->mutable_synthesize()->set_shards(7);  // would plan otherwise
  Core core(CoreDriver::WithVersion({}));
  for (size_t i = 0; i < events.size(); ++i) ASSERT_THAT(core.Replay(i == 0 ? event : events[i]), IsOk());
}

TEST(UpgradeTest, RefusesWhatANewerVersionWrote) {
  Events events = Unpack(ReadFile("v1.bin"));
  ASSERT_FALSE(events.empty());
  events.front().set_version(1000);
  Core core(CoreDriver::WithVersion({}));
  EXPECT_THAT(core.Replay(events.front()), StatusCodeIs(absl::StatusCode::kDataLoss));
  EXPECT_THAT(core.Restore("\x08\xE8\x07"), StatusCodeIs(absl::StatusCode::kDataLoss));
  EXPECT_THAT(core.Restore("no snapshot"), StatusCodeIs(absl::StatusCode::kDataLoss));
}

}  // namespace
}  // namespace refinery::jobs
