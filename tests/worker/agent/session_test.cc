// Tests of the worker's agent against a scripted coordinator, with a task program that does what its parameters say.

#include "worker/agent/session.h"

#include <signal.h>
#include <stdlib.h>

#include <filesystem>
#include <thread>

#include "common/channel.h"
#include "common/files.h"
#include "common/process.h"
#include "tests/support/fake_coordinator.h"
#include "tests/support/status_matchers.h"

namespace refinery::agent {
namespace {

using std::chrono::milliseconds;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;
using testing::IsOk;
using testing::StatusIs;
using Record = testing::FakeWorkers::Record;

v1::Lease MakeLease(const std::string& uri, uint64_t epoch = 1) {
  v1::Lease lease;
  lease.mutable_token()->set_job("job-1");
  lease.mutable_token()->set_path("student/import");
  lease.mutable_token()->set_epoch(epoch);
  lease.set_attempt(1);
  lease.mutable_spec()->set_job("job-1");
  lease.mutable_spec()->set_path("student/import");
  lease.mutable_spec()->mutable_import_model()->set_uri(uri);
  return lease;
}

bool OneCompleted(const Record& record) { return record.completed.size() == 1; }

class SessionTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::string name = (std::filesystem::temp_directory_path() / "agent-XXXXXX").string();
    cache_ = ::mkdtemp(name.data());
    metrics_ = *WorkerMetrics::Serve("none");
  }

  void TearDown() override {
    StopSession();
    std::filesystem::remove_all(cache_);
  }

  SessionOptions Options() {
    return {.channel = MakeChannel(coordinator_.address()),
            .coordinator = coordinator_.address(),
            .cache = cache_,
            .id = "w1",
            .threads = 3,
            .labels = {{"zone", "a"}},
            .task_program = FAKE_TASK,
            .drain_grace = milliseconds(100),
            .stop_grace = milliseconds(500),
            .transfers = {.max_attempts = 2, .initial_backoff = milliseconds(5), .max_backoff = milliseconds(20)},
            .metrics = metrics_.get()};
  }

  void StartSession() { StartSession(Options()); }

  void StartSession(const SessionOptions& options) {
    auto session = Session::Open(options);
    ASSERT_THAT(session, IsOk());
    session_ = *std::move(session);
    thread_ = std::thread([this] { run_status_ = session_->Run(); });
  }

  void StopSession() {
    if (session_) session_->Stop();
    if (thread_.joinable()) thread_.join();
    session_.reset();
  }

  // The pid that the fake task wrote, once it sleeps.
  pid_t SleepingPid() {
    for (int i = 0; i < 500; ++i) {
      auto text = ReadFile(cache_ / "sleeping.pid");
      if (text.ok() && !text->empty()) return std::stoi(*text);
      std::this_thread::sleep_for(milliseconds(10));
    }
    return -1;
  }

  static bool GoneWithin(pid_t pid, milliseconds wait) {
    auto deadline = std::chrono::steady_clock::now() + wait;
    while (std::chrono::steady_clock::now() < deadline) {
      if (ProcessStartTime(pid) == 0) return true;
      std::this_thread::sleep_for(milliseconds(10));
    }
    return false;
  }

  testing::FakeCoordinator coordinator_;
  testing::FakeWorkers& workers_ = coordinator_.workers;
  std::filesystem::path cache_;
  std::unique_ptr<WorkerMetrics> metrics_;
  std::unique_ptr<Session> session_;
  std::thread thread_;
  Status run_status_;
};

// Goal: inputs arrive by digest, outputs are in the store before the task is completed, and measurements, notes, log and
// the thread count go their ways.
TEST_F(SessionTest, SuccessfulTask) {
  v1::Lease lease = MakeLease("succeed");
  v1::ArtifactRef* input = lease.mutable_spec()->add_inputs();
  input->set_name("seeds");
  input->set_digest(coordinator_.artifacts.PutFolder({{"rows.jsonl", "{\"a\":1}\n"}}));
  workers_.Grant(lease);
  StartSession();
  ASSERT_TRUE(workers_.WaitFor(OneCompleted));
  Record record = workers_.record();
  const v1::CompleteTaskRequest& completed = record.completed[0];
  EXPECT_EQ(completed.lease().epoch(), 1u);
  ASSERT_TRUE(completed.has_success()) << completed.DebugString();
  EXPECT_EQ(completed.success().output().name(), "import_model");
  EXPECT_EQ(coordinator_.artifacts.Folder(completed.success().output().digest()),
            (std::map<std::string, std::string>{{"result.txt", "done student/import"},
                                                {"seeds/rows.jsonl", "{\"a\":1}\n"}}));
  ASSERT_THAT(completed.success().measurements(), SizeIs(1));
  EXPECT_EQ(completed.success().measurements(0).value(), 1.5);
  EXPECT_GT(completed.success().peak_memory_bytes(), 100'000u);
  ASSERT_THAT(record.notes, SizeIs(1));
  EXPECT_EQ(record.notes[0].code(), "damping_raised");
  EXPECT_THAT(record.log, HasSubstr("a log line\n"));  // two streams: what the other says may come between
  EXPECT_THAT(record.log, HasSubstr("threads 3\n"));
  EXPECT_THAT(record.log, HasSubstr("not an event\n"));
  StopSession();
  EXPECT_THAT(run_status_, IsOk());
  EXPECT_TRUE(std::filesystem::is_empty(cache_ / "work" / "w1"));
}

// Goal: the worker says what it is once, again when its cache changed or the coordinator asks, and otherwise only what moves.
TEST_F(SessionTest, SaysWhatItIsWhenThatChanges) {
  StartSession();
  ASSERT_TRUE(workers_.WaitFor([](const Record& record) { return record.synchronized >= 2; }));
  Record record = workers_.record();
  EXPECT_EQ(record.full, 1);
  const v1::WorkerInfo& full = record.last_full.worker();
  EXPECT_EQ(full.labels().at("zone"), "a");
  EXPECT_GT(full.memory_bytes(), 0u);
  EXPECT_GT(full.free_disk_bytes(), 0u);
  EXPECT_EQ(full.devices(0), "cpu");
  EXPECT_FALSE(full.address().empty());
  EXPECT_EQ(full.cached_size(), 0);
  EXPECT_TRUE(record.last.worker().brief());
  EXPECT_EQ(record.last.worker().id(), "w1");
  EXPECT_GT(record.last.worker().free_disk_bytes(), 0u);
  EXPECT_EQ(record.last.worker().labels_size() + record.last.worker().devices_size(), 0);

  v1::SynchronizeResponse ask;
  ask.set_tell_worker(true);
  workers_.AnswerOnce(ask);
  ASSERT_TRUE(workers_.WaitFor([](const Record& now) { return now.full == 2 && now.last.worker().brief(); }));
  EXPECT_EQ(workers_.record().last_full.worker().labels().at("zone"), "a");

  v1::Lease lease = MakeLease("succeed");
  v1::ArtifactRef* input = lease.mutable_spec()->add_inputs();
  input->set_name("seeds");
  input->set_digest(coordinator_.artifacts.PutFolder({{"rows.jsonl", "{}\n"}}));
  workers_.Grant(lease);
  ASSERT_TRUE(workers_.WaitFor(OneCompleted));
  const std::string output = workers_.record().completed[0].success().output().digest();
  ASSERT_TRUE(workers_.WaitFor([](const Record& now) { return now.last_full.worker().cached_size() == 2; }));
  EXPECT_THAT(workers_.record().last_full.worker().cached(), ::testing::UnorderedElementsAre(input->digest(), output));
}

// Goal: a member of a gang learns its rank and where to meet; the port is one that the worker keeps and told.
TEST_F(SessionTest, GangMembersLearnWhereToMeet) {
  StartSession();
  ASSERT_TRUE(workers_.WaitFor([](const Record& now) { return now.full >= 1; }));
  const v1::WorkerInfo worker = workers_.record().last_full.worker();
  ASSERT_EQ(worker.ports_size(), 1);
  v1::Lease lease = MakeLease("succeed");
  lease.mutable_gang()->set_id("x#1");
  lease.mutable_gang()->set_world_size(3);
  lease.mutable_gang()->set_address("host.example");
  lease.mutable_gang()->set_port(worker.ports(0));
  workers_.Grant(lease);
  ASSERT_TRUE(workers_.WaitFor(OneCompleted));
  EXPECT_THAT(workers_.record().log, HasSubstr(Join("rank 0 of 3 meets at host.example:", worker.ports(0), "\n")));
  workers_.Grant(MakeLease("succeed", 2));  // and one that is alone does not
  ASSERT_TRUE(workers_.WaitFor([](const Record& now) { return now.completed.size() == 2; }));
  EXPECT_EQ(workers_.record().log.find("rank", workers_.record().log.find("rank") + 4), std::string::npos);
}

// Goal: a port is not offered to the next gang while the program of one that was given up still runs.  Method: a program that does
// not heed SIGTERM, on a worker with room for another.
TEST_F(SessionTest, MeetingPortsAreNotOfferedWhileAnOldProgramRuns) {
  SessionOptions options = Options();
  options.slots = 2;
  StartSession(options);
  ASSERT_TRUE(workers_.WaitFor([](const Record& now) { return now.last_full.worker().ports_size() == 2; }));
  const uint32_t port = workers_.record().last_full.worker().ports(0), other = workers_.record().last_full.worker().ports(1);
  v1::Lease lease = MakeLease("stubborn");
  lease.mutable_gang()->set_id("x#1");
  lease.mutable_gang()->set_world_size(2);
  lease.mutable_gang()->set_address("host.example");
  lease.mutable_gang()->set_port(port);
  workers_.Grant(lease);
  const pid_t pid = SleepingPid();
  ASSERT_GT(pid, 0);
  workers_.CancelLease(lease.token());
  const int before = workers_.record().synchronized;
  ASSERT_TRUE(workers_.WaitFor([&](const Record& now) { return now.synchronized > before + 3; }));
  const Record record = workers_.record();
  ASSERT_NE(ProcessStartTime(pid), 0u) << "it ended too early for this test";
  EXPECT_EQ(record.last.free_slots(), 1u);
  EXPECT_THAT(record.last_full.worker().ports(), ElementsAre(other));
  EXPECT_TRUE(workers_.WaitFor([](const Record& now) { return now.last_full.worker().ports_size() == 2; }));
  EXPECT_EQ(ProcessStartTime(pid), 0u);
}

// Goal: a port is in use from the lease on, before its program begins, and free again when that never does.
TEST(PortReserveTest, InUseFromTheLeaseOn) {
  PortReserve reserve(2);
  const std::vector<uint32_t> ports = reserve.Ports();
  ASSERT_THAT(ports, SizeIs(2));
  reserve.Use(ports[0]);
  EXPECT_THAT(reserve.Ports(), ElementsAre(ports[1]));
  reserve.TakeBack(ports[0]);
  EXPECT_EQ(reserve.Ports(), ports);
  reserve.Use(1);  // not one of ours
  reserve.LetGo(1);
  reserve.TakeBack(1);
  EXPECT_EQ(reserve.Ports(), ports);
}

// Goal: notes and logs that the coordinator could not keep are said again; nothing is lost and nothing counted as failed.
TEST_F(SessionTest, RepeatsAReportThatWasNotKept) {
  v1::SynchronizeResponse again;
  again.set_repeat_report(true);
  workers_.Grant(MakeLease("sleep:60"));
  StartSession();
  ASSERT_GT(SleepingPid(), 0);
  ASSERT_TRUE(workers_.WaitFor([](const Record& now) { return now.last.running_size() == 1; }));
  workers_.AnswerOnce(again);
  const int before = workers_.record().synchronized;
  ASSERT_TRUE(workers_.WaitFor([&](const Record& now) { return now.synchronized > before + 3; }));
  EXPECT_EQ(workers_.record().last.running_size(), 1);
  EXPECT_THAT(workers_.record().completed, IsEmpty());
}

// Goal: a task's own error is passed on as it is; without one the exit code and the log are.
TEST_F(SessionTest, ErrorsOfTheTask) {
  workers_.Grant(MakeLease("error:USER:no such model", 1));
  workers_.Grant(MakeLease("silent", 2));
  StartSession();
  ASSERT_TRUE(workers_.WaitFor([](const Record& record) { return record.completed.size() == 2; }));
  Record record = workers_.record();
  EXPECT_EQ(record.completed[0].error().failure_class(), v1::USER);
  EXPECT_EQ(record.completed[0].error().message(), "no such model");
  EXPECT_EQ(record.completed[1].error().failure_class(), v1::BUG);
  EXPECT_THAT(record.completed[1].error().message(), HasSubstr("code 7"));
}

// Goal: a crash costs one attempt, not the agent, and the error carries the signal and the last log lines.
TEST_F(SessionTest, CrashOfTheTask) {
  workers_.Grant(MakeLease("crash:11", 1));
  workers_.Grant(MakeLease("succeed", 2));
  StartSession();
  ASSERT_TRUE(workers_.WaitFor([](const Record& record) { return record.completed.size() == 2; }));
  Record record = workers_.record();
  EXPECT_EQ(record.completed[0].error().failure_class(), v1::INFRA);
  EXPECT_THAT(record.completed[0].error().message(), HasSubstr("signal 11"));
  EXPECT_THAT(record.completed[0].error().message(), HasSubstr("about to crash"));
  EXPECT_TRUE(record.completed[1].has_success());
}

// Goal: a cancelled attempt is stopped, also when it ignores SIGTERM, and nothing is reported.
TEST_F(SessionTest, CancelledTask) {
  v1::Lease lease = MakeLease("stubborn");
  workers_.Grant(lease);
  StartSession();
  pid_t pid = SleepingPid();
  ASSERT_GT(pid, 0);
  workers_.CancelLease(lease.token());
  EXPECT_TRUE(GoneWithin(pid, milliseconds(3000)));
  ASSERT_TRUE(workers_.WaitFor([](const Record& record) { return record.last.free_slots() == 1; }));
  EXPECT_THAT(workers_.record().completed, IsEmpty());
}

// Goal: checkpoints are committed in order with their artifact, and a lease with a checkpoint resumes from its bytes.
TEST_F(SessionTest, CheckpointsCommitAndResume) {
  workers_.Grant(MakeLease("checkpoint:2", 1));
  StartSession();
  ASSERT_TRUE(workers_.WaitFor(OneCompleted));
  Record record = workers_.record();
  ASSERT_FALSE(record.checkpoints.empty());
  const v1::CommitCheckpointRequest last = record.checkpoints.back();
  EXPECT_EQ(last.step(), 2u);
  EXPECT_EQ(coordinator_.artifacts.Folder(last.checkpoint().digest()),
            (std::map<std::string, std::string>{{"state.txt", "state after 2"}}));
  EXPECT_EQ(record.completed[0].error().message(), "first run ends here");

  v1::Lease second = MakeLease("checkpoint:2", 2);
  *second.mutable_checkpoint() = last.checkpoint();
  second.set_checkpoint_step(2);
  workers_.Grant(second);
  ASSERT_TRUE(workers_.WaitFor([](const Record& r) { return r.completed.size() == 2; }));
  EXPECT_EQ(coordinator_.artifacts.Folder(workers_.record().completed[1].success().output().digest())["resumed.txt"],
            "state after 2");
}

// Goal: a task outlives a coordinator that is away for less than the lease's life, and its end is reported afterwards.
TEST_F(SessionTest, CoordinatorAwayForAWhile) {
  workers_.Grant(MakeLease("sleep:1"));
  StartSession();
  ASSERT_GT(SleepingPid(), 0);
  coordinator_.Stop();
  std::this_thread::sleep_for(milliseconds(1500));   // the task ends meanwhile
  coordinator_.Start();
  ASSERT_TRUE(workers_.WaitFor(OneCompleted));
  EXPECT_TRUE(workers_.record().completed[0].has_success());
  ASSERT_TRUE(workers_.WaitFor([](const Record& record) { return record.last.running().empty(); }));
}

// Goal: the same while its inputs are fetched and while its outputs are uploaded, for longer than the two tries of a
// transfer last (the channel's own included).
TEST_F(SessionTest, TransfersOutliveACoordinatorThatIsAway) {
  const grpc::Status away(grpc::StatusCode::DEADLINE_EXCEEDED, "no answer");
  v1::Lease lease = MakeLease("sleep:0.2");
  v1::ArtifactRef* input = lease.mutable_spec()->add_inputs();
  input->set_name("seeds");
  input->set_digest(coordinator_.artifacts.PutFolder({{"rows.jsonl", "{}\n"}}));
  coordinator_.artifacts.Refuse(away, 10);
  workers_.Grant(lease);
  StartSession();
  ASSERT_GT(SleepingPid(), 0);
  EXPECT_EQ(coordinator_.artifacts.refusals_left(), 0);
  coordinator_.Stop();
  std::this_thread::sleep_for(milliseconds(4500));
  coordinator_.Start();
  ASSERT_TRUE(workers_.WaitFor(OneCompleted));
  EXPECT_TRUE(workers_.record().completed[0].has_success()) << workers_.record().completed[0].DebugString();
}

// Goal: neither inputs nor outputs nor checkpoints are given up because the coordinator's disk is full or it moves too much already;
// the log says what the attempt waits for.
TEST_F(SessionTest, TransfersWaitForACoordinatorThatIsFull) {
  const grpc::Status full(grpc::StatusCode::RESOURCE_EXHAUSTED, "the disk is 98 % full");
  v1::Lease lease = MakeLease("sleep:0.5");
  v1::ArtifactRef* input = lease.mutable_spec()->add_inputs();
  input->set_name("seeds");
  input->set_digest(coordinator_.artifacts.PutFolder({{"rows.jsonl", "{}\n"}}));
  coordinator_.artifacts.Refuse(full, 10);
  workers_.Grant(lease);
  StartSession();
  ASSERT_GT(SleepingPid(), 0);
  EXPECT_EQ(coordinator_.artifacts.refusals_left(), 0);
  coordinator_.artifacts.Refuse(full, 10);
  ASSERT_TRUE(workers_.WaitFor(OneCompleted));
  EXPECT_TRUE(workers_.record().completed[0].has_success()) << workers_.record().completed[0].DebugString();
  EXPECT_EQ(coordinator_.artifacts.refusals_left(), 0);
  EXPECT_THAT(workers_.record().log, HasSubstr("waiting for the coordinator: the disk is 98 % full\n"));

  coordinator_.artifacts.Refuse(full, 10);
  workers_.Grant(MakeLease("checkpoint:1", 2));
  ASSERT_TRUE(workers_.WaitFor([](const Record& record) { return record.completed.size() == 2; }));
  ASSERT_THAT(workers_.record().checkpoints, SizeIs(1));
  EXPECT_EQ(workers_.record().checkpoints[0].step(), 1u);
}

// Goal: who stops the worker does not wait for a coordinator that takes nothing in.
TEST_F(SessionTest, StopsAlthoughTheCoordinatorIsFull) {
  coordinator_.artifacts.Refuse({grpc::StatusCode::RESOURCE_EXHAUSTED, "full"}, 1'000'000);
  workers_.Grant(MakeLease("succeed"));
  StartSession();
  ASSERT_TRUE(workers_.WaitFor([](const Record& record) { return record.phases.contains("uploading outputs"); }));
  StopSession();
  ASSERT_THAT(workers_.record().completed, SizeIs(1));
  EXPECT_EQ(workers_.record().completed[0].error().message(), "the worker was stopped");
}

// Goal: the worker stops a task itself when its lease may have run out.
TEST_F(SessionTest, FencesItself) {
  workers_.SetLeaseTtl(milliseconds(1000));
  workers_.Grant(MakeLease("sleep:60"));
  StartSession();
  pid_t pid = SleepingPid();
  ASSERT_GT(pid, 0);
  ASSERT_TRUE(workers_.WaitFor([](const Record& record) { return record.last.running_size() == 1; }));
  coordinator_.Stop();
  EXPECT_FALSE(GoneWithin(pid, milliseconds(300)));
  EXPECT_TRUE(GoneWithin(pid, milliseconds(2500)));
  coordinator_.Start();
  ASSERT_TRUE(workers_.WaitFor([](const Record& record) { return record.last.free_slots() == 1; }));
  EXPECT_THAT(workers_.record().completed, IsEmpty());
}

// Goal: a worker says how long no answer has reached it, and no longer than that.
TEST_F(SessionTest, SaysHowLongItHeardNothing) {
  workers_.Grant(MakeLease("sleep:60"));
  StartSession();
  ASSERT_GT(SleepingPid(), 0);
  ASSERT_TRUE(workers_.WaitFor([](const Record& record) { return record.last.running_size() == 1; }));
  const uint32_t before = workers_.record().longest_unheard_ms;
  coordinator_.Stop();
  std::this_thread::sleep_for(milliseconds(before + 1500));
  coordinator_.Start();
  EXPECT_TRUE(workers_.WaitFor([&](const Record& record) { return record.longest_unheard_ms >= before + 1500; }));
  EXPECT_TRUE(workers_.WaitFor([](const Record& record) { return record.last.unheard_ms() < 1000; }));
}

// Goal: an answer that renews nothing does not move the worker's fence; the attempt goes on until then.
TEST_F(SessionTest, AnswersThatRenewNothingDoNotMoveTheFence) {
  workers_.SetLeaseTtl(milliseconds(2000));
  workers_.Grant(MakeLease("sleep:60"));
  StartSession();
  const pid_t pid = SleepingPid();
  ASSERT_GT(pid, 0);
  ASSERT_TRUE(workers_.WaitFor([](const Record& record) { return record.last.running_size() == 1; }));
  workers_.SetRenews(false);
  EXPECT_FALSE(GoneWithin(pid, milliseconds(2000)));
  coordinator_.Stop();
  EXPECT_TRUE(GoneWithin(pid, milliseconds(1000)));  // had the answers counted, its fence would come after 1,500 ms
}

// Goal: the end of a task is reported until it is taken, and not again once it is refused as stale.
TEST_F(SessionTest, CompleteIsRepeatedUntilAnswered) {
  workers_.FailCompletes(3);
  workers_.Grant(MakeLease("succeed"));
  StartSession();
  ASSERT_TRUE(workers_.WaitFor(OneCompleted));
  EXPECT_EQ(workers_.record().refused, 3);
  workers_.AbortCompletes();
  workers_.Grant(MakeLease("succeed", 2));
  ASSERT_TRUE(workers_.WaitFor([](const Record& record) { return record.refused == 4; }));
  ASSERT_TRUE(workers_.WaitFor([](const Record& record) { return record.last.free_slots() == 1; }));
  EXPECT_EQ(workers_.record().refused, 4);
}

// Goal: an input that the store does not have fails the attempt without starting the task.
TEST_F(SessionTest, MissingInput) {
  v1::Lease lease = MakeLease("succeed");
  v1::ArtifactRef* input = lease.mutable_spec()->add_inputs();
  input->set_name("seeds");
  input->set_digest("sha256:" + std::string(64, 'a'));
  workers_.Grant(lease);
  StartSession();
  ASSERT_TRUE(workers_.WaitFor(OneCompleted));
  EXPECT_EQ(workers_.record().completed[0].error().failure_class(), v1::INFRA);
  EXPECT_THAT(workers_.record().completed[0].error().message(), HasSubstr("input 'seeds'"));
}

// Goal: a worker that is stopped ends its tasks after the grace and says so.
TEST_F(SessionTest, DrainsWhenStopped) {
  workers_.Grant(MakeLease("sleep:60"));
  StartSession();
  ASSERT_GT(SleepingPid(), 0);
  StopSession();
  Record record = workers_.record();
  ASSERT_THAT(record.completed, SizeIs(1));
  EXPECT_EQ(record.completed[0].error().failure_class(), v1::INFRA);
  EXPECT_EQ(record.completed[0].error().message(), "the worker was stopped");
  EXPECT_EQ(record.last.worker().state(), "draining");
  EXPECT_THAT(record.last.running(), IsEmpty());
}

// Goal: two workers cannot share an id in one cache, and a missing task program is named.
TEST_F(SessionTest, RefusesToStart) {
  StartSession();
  EXPECT_THAT(Session::Open(Options()), StatusIs(absl::StatusCode::kAlreadyExists, HasSubstr("w1")));
  SessionOptions options = Options();
  options.task_program = "/no/such/program";
  EXPECT_THAT(Session::Open(options), StatusIs(absl::StatusCode::kNotFound, HasSubstr("/no/such/program")));
}

// Goal: kill -9 of the worker program takes its task along.  Method: the real program.
TEST_F(SessionTest, TasksDieWithTheWorker) {
  workers_.Grant(MakeLease("sleep:60"));
  auto worker = Process::Start({.command = {REFINERY_BINARY_DIR "/bin/refinery-worker", "--coordinator",
                                            coordinator_.address(), "--cache", cache_.string(), "--metrics-address",
                                            "127.0.0.1:0", "--task-program", FAKE_TASK},
                                .pipes = false,
                                .log = cache_ / "worker.log"});
  ASSERT_THAT(worker, IsOk());
  pid_t pid = SleepingPid();
  ASSERT_GT(pid, 0) << *ReadFile(cache_ / "worker.log");
  ::kill((*worker)->pid(), SIGKILL);
  EXPECT_TRUE(GoneWithin(pid, milliseconds(2000)));
}

}  // namespace
}  // namespace refinery::agent
