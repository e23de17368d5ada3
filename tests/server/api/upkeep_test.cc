// What the coordinator does beside its loop: snapshots, compaction, collection, the disk.

#include "server/api/upkeep.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <future>
#include <thread>

#include "common/channel.h"
#include "server/store/artifacts.h"
#include "server/store/snapshots.h"
#include "tests/server/api/fake_worker.h"
#include "tests/server/api/test_server.h"
#include "tests/support/status_matchers.h"

namespace refinery::api {
namespace {

using refinery::testing::Caller;
using refinery::testing::FakeWorker;
using refinery::testing::IsOk;
using refinery::testing::StatusCodeIs;
using refinery::testing::StatusIs;
using refinery::testing::TempFolder;
using ::testing::HasSubstr;
using std::chrono::milliseconds;

class UpkeepTest : public ::testing::Test {
 protected:
  void Start(CoordinatorOptions options) {
    options.state = state_.path();
    options.long_poll = milliseconds(200);
    options.watch_heartbeat = milliseconds(200);
    options.make_report = [](const report::ReportInput&) { return report::Report{.markdown = "report"}; };
    options.space_of = [this](const auto&) { return Space(); };
    auto coordinator = Coordinator::Open(std::move(options));
    ASSERT_THAT(coordinator, IsOk());
    coordinator_ = *std::move(coordinator);
    auto server = Server::Start(coordinator_.get(), {});
    ASSERT_THAT(server, IsOk());
    server_ = *std::move(server);
    caller_ = Caller(MakeChannel(server_->address()));
  }
  void Stop() {
    server_.reset();
    coordinator_.reset();
  }
  void TearDown() override { Stop(); }

  StatusOr<store::DiskSpace> Space() const {
    const auto size = static_cast<double>(disk_bytes_);
    return store::DiskSpace{.total_bytes = disk_bytes_, .free_bytes = static_cast<uint64_t>((1 - used_) * size)};
  }

  // Plays a job to its end.
  std::string RunJob() {
    const auto job = caller_.Create();
    EXPECT_THAT(job, IsOk());
    FakeWorker worker(caller_.channel(), "w1");
    for (int i = 0; i < 200 && caller_.Get(job->id())->state() < v1::Job::SUCCEEDED; ++i) {
      const auto lease = worker.Next();
      if (!lease.ok() || lease->token().job().empty()) continue;
      EXPECT_THAT(worker.Run(*lease), IsOk());
    }
    EXPECT_EQ(caller_.Get(job->id())->state(), v1::Job::SUCCEEDED);
    return job->id();
  }

  std::string StateText() {
    std::promise<std::string> text;
    coordinator_->Post([&](Coordinator::Turn& turn) { text.set_value(jobs::Dump(turn.core.state())); });
    return text.get_future().get();
  }

  static bool Within(double seconds, const std::function<bool()>& condition) {
    for (int i = 0; i < seconds * 50; ++i) {
      if (condition()) return true;
      std::this_thread::sleep_for(milliseconds(20));
    }
    return false;
  }

  grpc::Status WatchFrom(const std::string& job, uint64_t after_seq) {
    grpc::ClientContext context;
    v1::WatchJobRequest request;
    request.set_id(job);
    request.set_after_seq(after_seq);
    const auto reader = caller_.jobs().WatchJob(&context, request);
    v1::WatchJobResponse response;
    while (reader->Read(&response)) {
    }
    return reader->Finish();
  }

  TempFolder state_;
  std::atomic<double> used_{0.5};
  std::atomic<uint64_t> disk_bytes_{uint64_t{100} << 30};
  std::unique_ptr<Coordinator> coordinator_;
  std::unique_ptr<Server> server_;
  Caller caller_;
};

// Goal: a start from a snapshot and the rest of the log is a start from the whole log.  Method: canonical text of the state.
TEST_F(UpkeepTest, StartFromASnapshotGivesTheSameState) {
  Start({.snapshot_every = 20});
  RunJob();
  ASSERT_TRUE(Within(5, [&] { return !store::ListSnapshots(state_.path()).empty(); }));
  RunJob();
  const std::string before = StateText();
  Stop();
  Start({});
  EXPECT_EQ(StateText(), before);
  Stop();
  std::filesystem::remove_all(state_.path() / "snapshots");
  Start({});
  EXPECT_EQ(StateText(), before);
}

// Goal: old events go, the job stays, and a watch from before says RESYNC.
TEST_F(UpkeepTest, OldJobsAreShownButNotWatchedFromTheStart) {
  Start({.snapshot_every = 10, .event_retention = milliseconds(0)});
  const std::string first = RunJob();
  ASSERT_TRUE(Within(5, [&] { return !store::ListSnapshots(state_.path()).empty(); }));
  const std::string second = RunJob();
  const auto resync = [&] { return WatchFrom(first, 0).error_code() == grpc::StatusCode::OUT_OF_RANGE; };
  // On a slow machine the first snapshot is of the middle of the first job, and only a third one lets its events go.
  ASSERT_TRUE(Within(8, [&] { return resync() || (RunJob(), false); }));
  EXPECT_THAT(FromGrpc(WatchFrom(first, 0)), StatusIs(absl::StatusCode::kOutOfRange, HasSubstr("RESYNC")));
  const auto job = caller_.Get(first);
  ASSERT_THAT(job, IsOk());
  EXPECT_EQ(job->state(), v1::Job::SUCCEEDED);
  EXPECT_TRUE(WatchFrom(first, job->as_of_seq()).ok());
  const std::string before = StateText();
  Stop();
  Start({});
  EXPECT_EQ(StateText(), before);
  EXPECT_THAT(caller_.Get(second), IsOk());
}

// Goal: what jobs refer to stays, what nobody refers to goes.
TEST_F(UpkeepTest, CollectsWhatNobodyRefersTo) {
  Start({.collect_every = milliseconds(100), .collect_grace = milliseconds(300)});
  const std::string job = RunJob();
  const auto orphan = store::PutArtifact(coordinator_->blobs(), "orphan", {{"file", "nobody wants this"}});
  ASSERT_THAT(orphan, IsOk());
  std::this_thread::sleep_for(milliseconds(10));
  const std::filesystem::path manifest =
      state_.path() / "cas" / orphan->digest().substr(7, 2) / orphan->digest().substr(7);
  ASSERT_TRUE(Within(10, [&] { return !std::filesystem::exists(manifest); }));
  EXPECT_THAT(coordinator_->blobs().Get(DigestOf("nobody wants this")), StatusCodeIs(absl::StatusCode::kNotFound));
  const auto shown = caller_.Get(job);
  ASSERT_THAT(shown, IsOk());
  for (const v1::Task& task : shown->tasks()) {
    if (task.output().digest().empty()) continue;
    EXPECT_THAT(store::CheckComplete(coordinator_->blobs(), task.output().digest()), IsOk()) << task.path();
  }
  EXPECT_THAT(store::CheckComplete(coordinator_->blobs(), shown->report().digest()), IsOk());
}

// Goal: a cancelled job shows the best adapter it came to, and the collection leaves it alone.
TEST_F(UpkeepTest, TheBestAdapterOfACancelledJobIsShownAndKept) {
  Start({.collect_every = milliseconds(1), .collect_grace = milliseconds(1)});
  const std::string id = caller_.Create()->id();
  FakeWorker worker(caller_.channel(), "w1");
  for (int i = 0, trained = 0; i < 200 && trained < 3; ++i) {
    const auto lease = worker.Next();
    if (!lease.ok() || lease->token().job().empty()) continue;
    ASSERT_THAT(worker.Run(*lease), IsOk());
    trained += lease->spec().has_train();
  }
  EXPECT_FALSE(caller_.Get(id)->has_best());
  v1::ChangeJobRequest request;
  request.set_id(id);
  ASSERT_EQ(caller_.Change(&v1::JobService::Stub::KillJob, request)->state(), v1::Job::CANCELLED);
  const v1::Job job = *caller_.Get(id);
  ASSERT_TRUE(job.has_best());
  EXPECT_FALSE(job.has_artifact());
  const auto made = std::find_if(job.tasks().begin(), job.tasks().end(),
                                 [&](const v1::Task& task) { return task.output().digest() == job.best().digest(); });
  ASSERT_NE(made, job.tasks().end());
  EXPECT_EQ(made->kind(), v1::TRAIN);
  const std::string orphan = *coordinator_->blobs().Put("of no use");
  ASSERT_TRUE(Within(8, [&] { return !coordinator_->blobs().IsStored(orphan); }));  // it did collect
  EXPECT_THAT(store::CheckComplete(coordinator_->blobs(), job.best().digest()), IsOk());
}

// Goal: what the collection finds missing is made again in the job that needs it, once.  Method: the import's output is removed while the
// job waits for a worker; then it runs to its end.
TEST_F(UpkeepTest, WhatTheStoreHasLostIsMadeAgain) {
  Start({.collect_every = milliseconds(1), .collect_grace = milliseconds(60'000)});
  const std::string id = caller_.Create()->id();
  FakeWorker worker(caller_.channel(), "w1");
  auto lease = worker.Next();
  ASSERT_THAT(lease, IsOk());
  ASSERT_EQ(lease->token().path(), "import/student");
  ASSERT_THAT(worker.Run(*lease), IsOk());
  const std::string digest = caller_.Get(id)->tasks(0).output().digest();
  const std::string hex = digest.substr(digest.find(':') + 1);
  ASSERT_TRUE(std::filesystem::remove(state_.path() / "cas" / hex.substr(0, 2) / hex));
  const auto import = [&] { return caller_.Get(id)->tasks(0); };
  ASSERT_TRUE(Within(8, [&] { return import().losses() == 1; }));
  EXPECT_EQ(import().state(), v1::Task::READY);
  for (int i = 0; i < 200 && caller_.Get(id)->state() < v1::Job::SUCCEEDED; ++i) {
    lease = worker.Next();
    if (!lease.ok() || lease->token().job().empty()) continue;
    ASSERT_THAT(worker.Run(*lease), IsOk());
  }
  EXPECT_EQ(caller_.Get(id)->state(), v1::Job::SUCCEEDED);
  EXPECT_EQ(import().losses(), 1u);
  EXPECT_EQ(import().output().digest(), digest);
}

// Goal: on a full disk no work is admitted, on a fuller one nothing is taken in; reading goes on, and all comes back with the room.
TEST_F(UpkeepTest, FullDiskStopsWorkInTwoSteps) {
  Start({});
  const std::string job = RunJob();
  used_ = 0.92;
  const auto refused = [&] { return absl::IsResourceExhausted(caller_.Create().status()); };
  ASSERT_TRUE(Within(4, refused));
  EXPECT_THAT(caller_.Create(), StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("more than 90 % used and less than 20 GiB free")));
  EXPECT_THAT(store::PutArtifact(coordinator_->blobs(), "a", {{"file", "still fits"}}), IsOk());
  used_ = 0.98;
  EXPECT_THAT(store::PutArtifact(coordinator_->blobs(), "a", {{"file", "too much"}}),
              StatusCodeIs(absl::StatusCode::kResourceExhausted));
  EXPECT_THAT(caller_.Get(job), IsOk());
  EXPECT_TRUE(Within(4, [&] { return coordinator_->metrics().Text().find("\nrefinery_disk_read_only 1") != std::string::npos; }));
  used_ = 0.5;
  ASSERT_TRUE(Within(4, [&] { return caller_.Create().ok(); }));
}

// Goal: a large disk that is nearly full by its share, but has room for days, refuses nothing.
TEST_F(UpkeepTest, LargeDiskIsNotFullByItsShareAlone) {
  disk_bytes_ = uint64_t{10'000} << 30;
  used_ = 0.98;
  Start({});
  std::this_thread::sleep_for(milliseconds(1'200));  // looked at once a second
  RunJob();
  EXPECT_EQ(coordinator_->metrics().Text().find("\nrefinery_disk_full 1"), std::string::npos);
}

// Goal: a log without room fails the callers whose changes did not fit, and only those; what was acknowledged stays, nothing else
// does, reading and leases go on, and when there is room the same process goes on.  Method: a bound on the database's size in the middle
// of a job; the state against one that is read anew from the log.
TEST_F(UpkeepTest, FullLogTakesBackWhatDidNotFit) {
  Start({});
  const auto job = caller_.Create();
  ASSERT_THAT(job, IsOk());
  const auto limit = [&](uint64_t bytes) {
    std::promise<void> done;
    coordinator_->Post([&](Coordinator::Turn&) {
      coordinator_->log().LimitBytes(bytes);
      done.set_value();
    });
    done.get_future().wait();
  };
  FakeWorker worker(caller_.channel(), "w1");
  const auto lease = worker.Next();
  ASSERT_THAT(lease, IsOk());
  auto success = worker.MakeSuccess(*lease);
  ASSERT_THAT(success, IsOk());
  limit(1);  // no page more than it has
  // Fills the last pages.
  Status refused;
  int accepted = 0;
  for (; refused.ok() && accepted < 500; ++accepted) {
    v1::CreateJobRequest request;
    *request.mutable_recipe() = refinery::testing::TinyRecipe();
    request.mutable_recipe()->set_seed(static_cast<uint64_t>(accepted) + 2);
    refused = caller_.Create(request).status();
  }
  EXPECT_THAT(refused, StatusIs(absl::StatusCode::kResourceExhausted, HasSubstr("free")));
  EXPECT_THAT(worker.Complete(*success), StatusCodeIs(absl::StatusCode::kResourceExhausted));
  EXPECT_THAT(caller_.Get(job->id()), IsOk());
  const auto listed = caller_.List();
  ASSERT_THAT(listed, IsOk());
  EXPECT_EQ(listed->jobs_size(), accepted);  // the first one and those that were accepted, without the refused one
  v1::SynchronizeRequest running = worker.Request({lease->token()}, 0);
  EXPECT_EQ(worker.Synchronize(running)->repeat_report(), false);
  running.mutable_running(0)->add_notes()->set_code("a_note");
  const auto repeated = worker.Synchronize(running);
  ASSERT_THAT(repeated, IsOk());
  EXPECT_TRUE(repeated->repeat_report());
  EXPECT_EQ(repeated->cancel_size(), 0);
  EXPECT_TRUE(Within(4, [&] { return coordinator_->metrics().Text().find("\nrefinery_disk_read_only 1") != std::string::npos; }));
  const std::string before = StateText();

  limit(0);
  ASSERT_TRUE(Within(5, [&] { return worker.Complete(*success).ok(); }));
  EXPECT_FALSE(worker.Synchronize(worker.Request())->repeat_report());
  ASSERT_TRUE(Within(5, [&] { return caller_.Create().ok(); }));
  const std::string after = StateText();
  EXPECT_NE(after, before);
  Stop();
  Start({});
  EXPECT_EQ(StateText(), after);
}

}  // namespace
}  // namespace refinery::api
