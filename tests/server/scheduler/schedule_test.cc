#include "server/scheduler/schedule.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <deque>

#include "server/scheduler/match.h"
#include "tests/server/jobs/tiny_job.h"
#include "tests/support/status_matchers.h"

namespace refinery::scheduler {
namespace {

using refinery::testing::CoreDriver;
using refinery::testing::IsOk;
using refinery::testing::TinyRecipe;
using ::testing::HasSubstr;

// Workers that a test names.
class Fleet {
 public:
  v1::WorkerInfo& Add(const std::string& id, uint32_t slots) {
    infos_.emplace_back().set_id(id);
    slots_.push_back(slots);
    return infos_.back();
  }
  void SetFree(const std::string& id, uint32_t slots) {
    for (size_t i = 0; i < infos_.size(); ++i) {
      if (infos_[i].id() == id) slots_[i] = slots;
    }
  }
  // It has said that it takes so many.
  void SetSaid(const std::string& id, uint32_t slots) { said_[id] = slots; }
  std::vector<Worker> Workers() const {
    std::vector<Worker> workers;
    for (size_t i = 0; i < infos_.size(); ++i) {
      const auto said = said_.find(infos_[i].id());
      workers.push_back({.id = infos_[i].id(), .free_slots = slots_[i], .info = &infos_[i],
                         .slots = said == said_.end() ? 0 : said->second});
    }
    return workers;
  }

 private:
  std::deque<v1::WorkerInfo> infos_;
  std::vector<uint32_t> slots_;
  std::map<std::string, uint32_t> said_;
};

std::string Text(const std::vector<Decision>& decisions) {
  std::string text;
  for (const Decision& decision : decisions) text += decision.job + "/" + decision.path + "@" + decision.worker + " ";
  return text;
}

// A driver whose jobs have `shards` synthesize tasks READY, each job of its own seed so that none is another's twin.
class ScheduleTest : public ::testing::Test {
 protected:
  void Create(const std::string& id, uint32_t shards, const v1::JobPolicy& policy = {}) {
    v1::Recipe recipe = TinyRecipe();
    recipe.set_seed(++seed_);
    recipe.mutable_data()->mutable_synthesize()->set_shards(shards);
    jobs::Core::NewJob job{.id = id};
    *job.created.mutable_recipe() = recipe;
    for (const std::string& role : refinery::testing::TinyFileRoles()) (*job.created.mutable_files())[role] = DigestOf(role);
    *job.created.mutable_policy() = policy;
    ASSERT_THAT(driver_.core.CreateJob(job, driver_.now, &driver_.events), IsOk());
    const auto lease = driver_.core.Grant(id, "import/student", "importer", "i", driver_.now, &driver_.events);
    ASSERT_THAT(lease, IsOk());
    ASSERT_THAT(driver_.Complete(CoreDriver::Success(*lease)), IsOk());
  }
  v1::Lease Lease(const std::string& job, const std::string& path, const std::string& worker) {
    const auto lease = driver_.core.Grant(job, path, worker, "i", driver_.now, &driver_.events);
    RF_CHECK(lease.ok());
    return *lease;
  }
  Pass Run(const ScheduleOptions& options = {}) { return Schedule(driver_.core, fleet_.Workers(), driver_.now, options); }
  Wait Why(const std::string& job, const std::string& path) {
    const jobs::JobState& state = driver_.Job(job);
    return Explain(driver_.core, state, state.index.at(path), fleet_.Workers(), driver_.now);
  }

  CoreDriver driver_;
  Fleet fleet_;
  uint64_t seed_ = 0;
};

TEST_F(ScheduleTest, TakesTasksInTheirOrderAndWorkersWithTheMostRoom) {
  Create("a", 2);
  Create("b", 2);
  fleet_.Add("x", 1);
  fleet_.Add("y", 2);
  EXPECT_EQ(Text(Run().grants), "a/synthesize/0@y a/synthesize/1@x b/synthesize/0@y ");
}

TEST_F(ScheduleTest, GrantsNothingWithoutRoom) {
  Create("a", 1);
  fleet_.Add("x", 0);
  EXPECT_EQ(Text(Run().grants), "");
  EXPECT_EQ(Why("a", "synthesize/0").reason, v1::WAIT_NO_FREE_WORKER);
}

TEST_F(ScheduleTest, PrefersTheWorkerThatKnowsTheJob) {
  Create("a", 1);
  fleet_.Add("importer", 1);
  fleet_.Add("y", 9);
  EXPECT_EQ(Text(Run().grants), "a/synthesize/0@importer ");
}

TEST_F(ScheduleTest, PrefersTheWorkerThatHoldsTheInputs) {
  Create("a", 1);
  fleet_.Add("importer", 1);
  fleet_.Add("y", 1).add_cached(DigestOf("import/student"));
  EXPECT_EQ(Text(Run().grants), "a/synthesize/0@y ");
}

// Goal: "elsewhere" is kept while there is an elsewhere, even a busy one, and given up when there is none.
TEST_F(ScheduleTest, AvoidsAWorkerWhileAnotherOneLives) {
  Create("a", 1);
  const v1::Lease lease = Lease("a", "synthesize/0", "x");
  ASSERT_THAT(driver_.Complete(CoreDriver::Failure(lease, v1::NODE)), IsOk());
  driver_.Wait(60'000);
  fleet_.Add("x", 1);
  EXPECT_EQ(Text(Run().grants), "a/synthesize/0@x ");
  fleet_.Add("y", 0);
  EXPECT_EQ(Text(Run().grants), "");
  EXPECT_EQ(Why("a", "synthesize/0").reason, v1::WAIT_AVOIDED);
  fleet_.Add("z", 1);
  EXPECT_EQ(Text(Run().grants), "a/synthesize/0@z ");
}

TEST_F(ScheduleTest, HigherPriorityGoesFirst) {
  v1::JobPolicy urgent;
  urgent.set_priority(5);
  Create("a", 1);
  Create("b", 1, urgent);
  fleet_.Add("x", 1);
  EXPECT_EQ(Text(Run().grants), "b/synthesize/0@x ");
}

// Goal: tenants share by weight, whatever they have submitted.  Method: 12 slots, weights 2 and 1, far more tasks than slots.
TEST_F(ScheduleTest, TenantsShareByWeight) {
  v1::JobPolicy heavy, light;
  heavy.set_tenant("heavy");
  light.set_tenant("light");
  Create("a", 30, light);
  Create("b", 30, heavy);
  v1::TenantPolicy tenant;
  tenant.set_tenant("heavy");
  tenant.set_weight(2);
  ASSERT_THAT(driver_.core.SetTenant(tenant, driver_.now, &driver_.events), IsOk());
  fleet_.Add("x", 12);
  std::map<std::string, int> granted;
  for (const Decision& decision : Run().grants) ++granted[decision.job];
  EXPECT_EQ(granted["b"], 8);
  EXPECT_EQ(granted["a"], 4);
}

// Goal: a quota counts the leases that live, also those of an earlier pass, and says so.
TEST_F(ScheduleTest, QuotaHolds) {
  v1::TenantPolicy tenant;
  tenant.set_tenant("default");
  tenant.set_max_leases(3);
  Create("a", 9);
  ASSERT_THAT(driver_.core.SetTenant(tenant, driver_.now, &driver_.events), IsOk());
  fleet_.Add("x", 9);
  Lease("a", "synthesize/0", "x");
  EXPECT_EQ(Text(Run().grants), "a/synthesize/1@x a/synthesize/2@x ");
  Lease("a", "synthesize/1", "x");
  Lease("a", "synthesize/2", "x");
  EXPECT_EQ(Text(Run().grants), "");
  EXPECT_EQ(Why("a", "synthesize/3").reason, v1::WAIT_QUOTA);
  EXPECT_THAT(Why("a", "synthesize/3").text, HasSubstr("3 of the 3"));
}

// Goal: a task goes only where everything it needs is, counting what runs there, and does not stop the tasks behind it.
TEST_F(ScheduleTest, MatchesDevicesMemoryAndLabels) {
  v1::JobPolicy policy;
  policy.mutable_requirements()->set_devices(2);
  policy.mutable_requirements()->set_device("H200");
  (*policy.mutable_requirements()->mutable_labels())["zone"] = "a";
  Create("gpu", 3, policy);
  Create("cpu", 1);
  fleet_.Add("plain", 4);
  v1::WorkerInfo& wrong = fleet_.Add("other", 1);
  for (int i = 0; i < 4; ++i) wrong.add_devices("NVIDIA H200");
  EXPECT_EQ(Text(Run().grants), "cpu/synthesize/0@plain ");
  EXPECT_EQ(Why("gpu", "synthesize/0").reason, v1::WAIT_NO_MATCH);
  EXPECT_THAT(Why("gpu", "synthesize/0").text, HasSubstr("2 devices H200, label zone=a"));
  v1::WorkerInfo& right = fleet_.Add("right", 8);
  for (int i = 0; i < 4; ++i) right.add_devices("NVIDIA H200");
  (*right.mutable_labels())["zone"] = "a";
  EXPECT_EQ(Text(Run().grants), "gpu/synthesize/0@right gpu/synthesize/1@right cpu/synthesize/0@plain ");
  Lease("gpu", "synthesize/0", "right");
  EXPECT_EQ(Text(Run().grants), "gpu/synthesize/1@right cpu/synthesize/0@plain ");
}

// Goal: the devices counted are accelerators of the model and the memory asked for, not the processor.
TEST_F(ScheduleTest, MatchesModelAndMemoryOfEachDevice) {
  v1::JobPolicy policy;
  policy.mutable_requirements()->set_devices(1);
  policy.mutable_requirements()->set_device("H200");
  policy.mutable_requirements()->set_device_memory_bytes(uint64_t{100} << 30);
  Create("gpu", 1, policy);
  fleet_.Add("cpu", 1).add_devices("cpu");
  v1::WorkerInfo& small = fleet_.Add("small", 1);
  v1::WorkerInfo& mixed = fleet_.Add("mixed", 1);
  for (v1::WorkerInfo* info : {&small, &mixed}) {
    for (const char* name : {"cpu", "cuda:0", "cuda:1"}) info->add_devices(name);
    for (int i = 0; i < 2; ++i) {
      v1::Device* device = info->add_device_details();
      device->set_name(Join("cuda:", i));
      device->set_model("NVIDIA H200");
      device->set_memory_bytes(uint64_t{info == &mixed && i == 1 ? 139u : 80u} << 30);
    }
    info->set_device_memory_bytes(uint64_t{80} << 30);
  }
  EXPECT_EQ(Text(Run().grants), "gpu/synthesize/0@mixed ");
  Create("plain", 1);
  EXPECT_EQ(Text(Run().grants), "gpu/synthesize/0@mixed plain/synthesize/0@cpu ");
}

// Goal: a task that no worker can run is explained by what is missing, with counts and the best there is.
TEST_F(ScheduleTest, ExplainsWhatEveryWorkerLacks) {
  v1::JobPolicy policy;
  policy.mutable_requirements()->set_disk_bytes(uint64_t{500} << 30);
  policy.mutable_requirements()->set_memory_bytes(uint64_t{64} << 30);
  (*policy.mutable_requirements()->mutable_labels())["zone"] = "a";
  Create("a", 1, policy);
  v1::WorkerInfo& x = fleet_.Add("x", 1);
  x.set_memory_bytes(uint64_t{128} << 30);
  x.set_free_disk_bytes(uint64_t{12} << 30);
  v1::WorkerInfo& y = fleet_.Add("y", 1);
  y.set_memory_bytes(uint64_t{32} << 30);
  y.set_free_disk_bytes(uint64_t{700} << 30);
  (*y.mutable_labels())["zone"] = "b";
  const Wait wait = Why("a", "synthesize/0");
  EXPECT_EQ(wait.reason, v1::WAIT_NO_MATCH);
  EXPECT_EQ(wait.text, "it needs 64 GiB memory, 500 GiB free disk, label zone=a, which none of the 2 workers has: "
                       "1 has too little memory (at most 128 GiB), 1 has too little free disk (at most 700 GiB), "
                       "2 of them lack the label zone=a");
}

// Goal: a gang starts whole or not at all; others fill in until it has waited long enough, then its places are kept free.
TEST_F(ScheduleTest, GangsStartWholeAndAreNotStarved) {
  v1::JobPolicy policy;
  (*policy.mutable_by_kind())["synthesize"].set_gang(4);
  Create("gang", 4, policy);
  Create("small", 9);
  fleet_.Add("x", 2);
  fleet_.Add("y", 1);
  EXPECT_EQ(Text(Run().grants), "small/synthesize/0@x small/synthesize/1@x small/synthesize/2@y ");
  EXPECT_EQ(Why("gang", "synthesize/0").reason, v1::WAIT_GANG);
  driver_.Wait(601'000);
  fleet_.Add("z", 0);
  Lease("small", "synthesize/8", "z");
  EXPECT_EQ(Text(Run().grants), "");
  EXPECT_EQ(Why("gang", "synthesize/0").text, "its gang of 4 does not fit into the 3 free slots");
  fleet_.SetFree("z", 1);
  const Pass pass = Run();
  ASSERT_EQ(pass.grants.size(), 4);
  for (const Decision& decision : pass.grants) {
    EXPECT_EQ(decision.job, "gang");
    EXPECT_EQ(decision.gang, 1);
  }
}

// Goal: a gang that all workers together have too few slots or devices for keeps none of them from others, however long it waits, and says so
// with numbers; a slot that is neither free nor leased, because its worker is between two polls, counts.
TEST_F(ScheduleTest, AGangLargerThanTheFleetHoldsNothing) {
  v1::JobPolicy policy;
  (*policy.mutable_by_kind())["synthesize"].set_gang(4);
  Create("gang", 9, policy);
  Create("small", 9);
  fleet_.Add("x", 2);
  fleet_.Add("y", 1);
  driver_.Wait(601'000);
  EXPECT_EQ(Text(Run().grants), "small/synthesize/0@x small/synthesize/1@x small/synthesize/2@y ");
  const Wait wait = Why("gang", "synthesize/0");
  EXPECT_EQ(wait.reason, v1::WAIT_GANG);
  EXPECT_EQ(wait.text, "its gang of 4 is larger than the fleet: the 2 workers that could take it have room for 3 of them at once; "
                       "start more workers, or set a smaller requirements.gang in its policy");
  fleet_.SetSaid("y", 2);
  EXPECT_EQ(Text(Run().grants), "");
}

TEST_F(ScheduleTest, AGangWithMoreDevicesThanTheFleetHoldsNothing) {
  v1::JobPolicy policy;
  v1::Requirements& needs = (*policy.mutable_by_kind())["synthesize"];
  needs.set_gang(2);
  needs.set_devices(1);
  Create("gang", 2, policy);
  Create("small", 1);
  fleet_.Add("x", 8).add_devices("cuda:0");
  driver_.Wait(601'000);
  EXPECT_EQ(Text(Run().grants), "small/synthesize/0@x ");
  EXPECT_THAT(Why("gang", "synthesize/0").text, HasSubstr("room for 1 of them"));
}

// Goal: what a job of an older version asks for may be any number; it does not wrap around.
TEST(MatchTest, ImmenseNeedsFitNowhere) {
  v1::WorkerInfo worker;
  worker.set_memory_bytes(uint64_t{64} << 30);
  worker.add_devices("cuda:0");
  v1::Requirements needs;
  needs.set_memory_bytes(~uint64_t{0} - (uint64_t{8} << 30));
  EXPECT_FALSE(CanNow(&worker, {.memory_bytes = uint64_t{16} << 30}, needs));
  needs.set_memory_bytes(uint64_t{48} << 30);
  EXPECT_TRUE(CanNow(&worker, {.memory_bytes = uint64_t{16} << 30}, needs));
  EXPECT_FALSE(CanNow(&worker, {.memory_bytes = uint64_t{17} << 30}, needs));
  needs.set_devices(1);
  EXPECT_FALSE(CanNow(&worker, {.devices = uint64_t{1} << 32}, needs));
}

// Goal: a gang of which one member waits for its next attempt waits as a whole; the last, smaller one of a job does not.
TEST_F(ScheduleTest, GangWaitsForAMemberThatFailed) {
  v1::JobPolicy policy;
  (*policy.mutable_by_kind())["synthesize"].set_gang(3);
  Create("gang", 5, policy);
  fleet_.Add("x", 9);
  const Pass pass = Run();
  ASSERT_EQ(pass.grants.size(), 5);
  std::map<uint32_t, int> sizes;
  for (const Decision& decision : pass.grants) ++sizes[decision.gang];
  EXPECT_EQ(sizes, (std::map<uint32_t, int>{{1, 3}, {2, 2}}));
  std::vector<jobs::Core::Member> members;
  for (int i = 0; i < 3; ++i) members.push_back({pass.grants[static_cast<size_t>(i)].path, "x", "i"});
  const auto leases = driver_.core.GrantGang("gang", members, "host", 7, driver_.now, &driver_.events);
  ASSERT_THAT(leases, IsOk());
  for (const char* path : {"synthesize/3", "synthesize/4"}) {
    ASSERT_THAT(driver_.Complete(CoreDriver::Success(Lease("gang", path, "x"))), IsOk());
  }
  ASSERT_THAT(driver_.Complete(CoreDriver::Failure((*leases)[1], v1::INFRA)), IsOk());
  const auto synthesizes = [&] {  // others are ready by now
    const Pass now = Run();
    return std::count_if(now.grants.begin(), now.grants.end(),
                         [](const Decision& decision) { return decision.path.starts_with("synthesize/"); });
  };
  EXPECT_EQ(synthesizes(), 0);
  driver_.Wait(10'000);
  EXPECT_EQ(synthesizes(), 3);
}

// Goal: only strictly lower priority is pushed out, only tasks with checkpoints, as many as wait, at a checkpoint, uncharged.
TEST_F(ScheduleTest, PreemptsLowerPriorityAtACheckpoint) {
  CoreDriver& driver = driver_;
  Create("low", 1);
  const v1::Lease train = driver.RunUntil([](const v1::Lease& lease) { return lease.spec().has_train(); });
  ASSERT_FALSE(train.token().path().empty());
  fleet_.Add("w1", 0);
  Create("same", 1);
  EXPECT_EQ(Text(Run().preemptions), "");
  v1::JobPolicy urgent;
  urgent.set_priority(1);
  Create("high", 1, urgent);
  Lease("same", "synthesize/0", "w1");  // writes no checkpoints
  const Pass pass = Run();
  ASSERT_EQ(Text(pass.preemptions), "low/" + train.token().path() + "@w1 ");
  driver.core.Preempt("low", train.token().path(), "make room");
  EXPECT_EQ(Text(Run().preemptions), "");
  EXPECT_EQ(driver.Task("low", train.token().path()).state, v1::Task::LEASED);
  v1::CommitCheckpointRequest checkpoint;
  *checkpoint.mutable_lease() = train.token();
  checkpoint.set_step(10);
  checkpoint.mutable_checkpoint()->set_digest(DigestOf("checkpoint"));
  ASSERT_THAT(driver.core.CommitCheckpoint(checkpoint, driver.now, &driver.events), IsOk());
  const jobs::TaskState& task = driver.Task("low", train.token().path());
  EXPECT_EQ(task.state, v1::Task::READY);
  EXPECT_EQ(task.checkpoint_step, 10);
  EXPECT_EQ(task.crashes + task.infra_failures, 0);
  EXPECT_EQ(driver.Synchronize({train}).cancel.size(), 1);
}

TEST_F(ScheduleTest, ExplainsTheOtherReasons) {
  Create("a", 1);
  EXPECT_EQ(Why("a", "synthesize/0").reason, v1::WAIT_NO_WORKER);
  EXPECT_EQ(Why("a", "critique/0").reason, v1::WAIT_DEPENDENCIES);
  EXPECT_THAT(Why("a", "critique/0").text, HasSubstr("synthesize/0"));
  const v1::Lease lease = Lease("a", "synthesize/0", "x");
  EXPECT_EQ(Why("a", "synthesize/0").reason, v1::WAIT_REASON_UNSPECIFIED);
  ASSERT_THAT(driver_.Complete(CoreDriver::Failure(lease, v1::INFRA)), IsOk());
  EXPECT_EQ(Why("a", "synthesize/0").reason, v1::WAIT_BACKOFF);
  ASSERT_THAT(driver_.core.PauseJob("a", "", driver_.now, &driver_.events), IsOk());
  EXPECT_EQ(Why("a", "synthesize/0").reason, v1::WAIT_PAUSED);
}

}  // namespace
}  // namespace refinery::scheduler
