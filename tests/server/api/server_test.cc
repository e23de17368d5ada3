// The coordinator as its clients see it: real gRPC over loopback, a state folder on disk, workers that play their tasks.

#include "server/api/server.h"

#include <gmock/gmock.h>
#include <grpcpp/create_channel.h>
#include <gtest/gtest.h>

#include <thread>

#include "common/channel.h"
#include "refinery/v1/artifact_service.grpc.pb.h"
#include "refinery/v1/job_service.grpc.pb.h"
#include "tests/server/api/fake_worker.h"
#include "tests/server/jobs/tiny_job.h"
#include "tests/server/store/temp_folder.h"
#include "tests/support/status_matchers.h"

namespace refinery::api {
namespace {

using refinery::testing::FakeWorker;
using refinery::testing::IsOk;
using refinery::testing::StatusCodeIs;
using refinery::testing::StatusIs;
using refinery::testing::TempFolder;
using refinery::testing::TinyFileRoles;
using refinery::testing::TinyRecipe;
using ::testing::HasSubstr;

class ServerTest : public ::testing::Test {
 protected:
  void SetUp() override { StartServer(); }
  void TearDown() override { StopServer(); }

  void StartServer() {
    auto coordinator = Coordinator::Open({.state = state_.path(),
                                          .lease_ttl = std::chrono::milliseconds(lease_ttl_ms_),
                                          .long_poll = std::chrono::milliseconds(300),
                                          .watch_heartbeat = std::chrono::milliseconds(200),
                                          .retry_backoff = std::chrono::milliseconds(10),
                                          .make_report = [](const report::ReportInput& input) {
                                            return report::Report{.markdown = Join("report of ", input.job.id(), " with ",
                                                                                   input.curves.size(), " curves"),
                                                                  .html = "<html></html>",
                                                                  .table = "table"};
                                          },
                                          .disk_full = {},
                                          .disk_read_only = {}});
    ASSERT_THAT(coordinator, IsOk());
    coordinator_ = *std::move(coordinator);
    auto server = Server::Start(coordinator_.get(), {.listen = "127.0.0.1:0"});
    ASSERT_THAT(server, IsOk());
    server_ = *std::move(server);
    channel_ = MakeChannel(server_->address());
    jobs_ = v1::JobService::NewStub(channel_);
    artifacts_ = v1::ArtifactService::NewStub(channel_);
  }
  void StopServer() {
    server_.reset();
    coordinator_.reset();
  }

  static void SetDeadline(grpc::ClientContext& context, int seconds = 5) {
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(seconds));
  }

  StatusOr<v1::Job> Create(const std::string& request_id = "", const v1::Recipe& recipe = TinyRecipe()) {
    v1::CreateJobRequest request;
    *request.mutable_recipe() = recipe;
    request.set_request_id(request_id);
    for (const std::string& role : TinyFileRoles()) {
      TempFolder folder;
      RF_RETURN_IF_ERROR(WriteFileAtomically(folder.path() / "rows.jsonl", role));
      RF_ASSIGN_OR_RETURN(const v1::ArtifactRef ref, ArtifactClient(channel_).UploadFolder(folder.path(), role));
      (*request.mutable_files())[role] = ref.digest();
    }
    grpc::ClientContext context;
    SetDeadline(context);
    v1::Job job;
    RF_RETURN_IF_ERROR(FromGrpc(jobs_->CreateJob(&context, request, &job)));
    return job;
  }

  StatusOr<v1::Job> Get(const std::string& id) {
    grpc::ClientContext context;
    SetDeadline(context);
    v1::GetJobRequest request;
    request.set_id(id);
    v1::Job job;
    RF_RETURN_IF_ERROR(FromGrpc(jobs_->GetJob(&context, request, &job)));
    return job;
  }

  // Everything a watch from `after_seq` says, until it ends or `limit` events came.
  StatusOr<std::vector<uint64_t>> Watch(const std::string& id, uint64_t after_seq, size_t limit = 1'000'000) {
    grpc::ClientContext context;
    SetDeadline(context, 30);
    v1::WatchJobRequest request;
    request.set_id(id);
    request.set_after_seq(after_seq);
    const auto reader = jobs_->WatchJob(&context, request);
    std::vector<uint64_t> seqs;
    v1::WatchJobResponse response;
    while (reader->Read(&response)) {
      if (response.has_event()) seqs.push_back(response.event().seq());
      if (seqs.size() == limit) {
        context.TryCancel();
        reader->Finish();
        return seqs;
      }
    }
    RF_RETURN_IF_ERROR(FromGrpc(reader->Finish()));
    return seqs;
  }

  // Plays every task of the job with one worker.
  void RunJob(const std::string& id) {
    FakeWorker worker(channel_, "w1");
    for (int i = 0; i < 200; ++i) {
      const auto lease = worker.Next();
      ASSERT_THAT(lease, IsOk());
      if (!lease->token().path().empty()) {
        ASSERT_THAT(worker.Run(*lease), IsOk());
      } else if (Get(id)->state() >= v1::Job::SUCCEEDED) {
        return;
      }
    }
    FAIL() << "the job did not end";
  }

  TempFolder state_;
  int lease_ttl_ms_ = 5'000;
  std::unique_ptr<Coordinator> coordinator_;
  std::unique_ptr<Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::JobService::Stub> jobs_;
  std::unique_ptr<v1::ArtifactService::Stub> artifacts_;
};

// Goal: a whole job over the wire, followed by one watcher from its start, and by others from the middle, without a gap or a
// duplicate.
TEST_F(ServerTest, RunsAJobWhileOthersWatch) {
  const auto job = Create();
  ASSERT_THAT(job, IsOk());
  EXPECT_EQ(job->state(), v1::Job::PENDING);
  StatusOr<std::vector<uint64_t>> live;
  std::thread watcher([&] { live = Watch(job->id(), 0); });
  RunJob(job->id());
  watcher.join();

  const auto ended = Get(job->id());
  ASSERT_THAT(ended, IsOk());
  EXPECT_EQ(ended->state(), v1::Job::SUCCEEDED) << ended->reason();
  EXPECT_EQ(ended->tasks_done(), ended->tasks_total());
  EXPECT_EQ(ended->artifact().digest(), ended->tasks(ended->tasks_size() - 1).output().digest());

  ASSERT_THAT(live, IsOk());
  std::vector<uint64_t> expected(ended->as_of_seq());
  for (size_t i = 0; i < expected.size(); ++i) expected[i] = i + 1;
  EXPECT_EQ(*live, expected);
  const uint64_t middle = expected.size() / 2;
  EXPECT_THAT(Watch(job->id(), middle), refinery::testing::IsOkAndHolds(std::vector<uint64_t>(expected.begin() + middle, expected.end())));
  EXPECT_THAT(Watch(job->id(), expected.size()), refinery::testing::IsOkAndHolds(std::vector<uint64_t>()));

  const auto report = ArtifactClient(channel_).ReadArtifactFile(ended->report().digest(), "report.md", 1000);
  EXPECT_THAT(report, refinery::testing::IsOkAndHolds(Join("report of ", job->id(), " with 4 curves")));
}

// Goal: a restart in the middle of a job loses nothing: leases are adopted, the watch goes on where it stood.
TEST_F(ServerTest, RestartGoesOnWithTheJob) {
  const auto job = Create("request-1");
  ASSERT_THAT(job, IsOk());
  v1::Lease lease;
  v1::CompleteTaskRequest success;
  {
    FakeWorker worker(channel_, "w1");
    for (int i = 0; i < 3; ++i) ASSERT_THAT(worker.Run(*worker.Next()), IsOk());
    lease = *worker.Next();
    ASSERT_FALSE(lease.token().path().empty());
    success = *worker.MakeSuccess(lease);
  }
  const auto before = Watch(job->id(), 0, Get(job->id())->as_of_seq());
  ASSERT_THAT(before, IsOk());
  StopServer();
  StartServer();
  EXPECT_EQ(Create("request-1")->id(), job->id());
  FakeWorker worker(channel_, "w1");
  const auto answer = worker.Synchronize(worker.Request({lease.token()}, 0));
  ASSERT_THAT(answer, IsOk());
  EXPECT_TRUE(answer->cancel().empty());
  ASSERT_THAT(worker.Complete(success), IsOk());
  RunJob(job->id());
  const auto ended = Get(job->id());
  EXPECT_EQ(ended->state(), v1::Job::SUCCEEDED) << ended->reason();
  for (const v1::Task& task : ended->tasks()) EXPECT_LE(task.attempt(), 1) << task.path();
  const auto after = Watch(job->id(), before->back());
  ASSERT_THAT(after, IsOk());
  EXPECT_EQ(after->front(), before->back() + 1);
  EXPECT_EQ(after->back(), ended->as_of_seq());
}

// Goal: a worker that vanished loses its task after the lease time, and its late result is refused over the wire.
TEST_F(ServerTest, VanishedWorkersTaskIsLeasedAgain) {
  StopServer();
  lease_ttl_ms_ = 300;
  StartServer();
  ASSERT_THAT(Create(), IsOk());
  FakeWorker vanished(channel_, "w1");
  FakeWorker other(channel_, "w2");
  const v1::Lease first = *vanished.Next();
  ASSERT_EQ(first.token().path(), "import/student");
  v1::Lease second;
  for (int i = 0; i < 20 && second.token().path().empty(); ++i) second = *other.Next();
  EXPECT_EQ(second.token().path(), "import/student");
  EXPECT_EQ(second.attempt(), 2);
  EXPECT_THAT(vanished.Run(first), StatusIs(absl::StatusCode::kAborted, HasSubstr("STALE_LEASE")));
  EXPECT_THAT(other.Run(second), IsOk());
  EXPECT_THAT(coordinator_->metrics().Text(), HasSubstr("refinery_leases_expired_total 1"));
}

// Goal: an output that was not uploaded is not accepted, and the attempt can still be completed afterwards.
TEST_F(ServerTest, CompletionNeedsTheUploadedOutput) {
  ASSERT_THAT(Create(), IsOk());
  FakeWorker worker(channel_, "w1");
  const v1::Lease lease = *worker.Next();
  v1::CompleteTaskRequest request = *worker.MakeSuccess(lease);
  v1::CompleteTaskRequest missing = request;
  missing.mutable_success()->mutable_output()->set_digest(DigestOf("never uploaded"));
  EXPECT_THAT(worker.Complete(missing), StatusCodeIs(absl::StatusCode::kFailedPrecondition));
  EXPECT_THAT(worker.Complete(request), IsOk());
  EXPECT_THAT(worker.Complete(request), IsOk());  // the answer was lost, say
}

// Goal: cancelling reaches the worker within one call, and the watch ends with the job.
TEST_F(ServerTest, CancelReachesTheWorker) {
  const auto job = Create();
  ASSERT_THAT(job, IsOk());
  FakeWorker worker(channel_, "w1");
  const v1::Lease lease = *worker.Next();
  grpc::ClientContext context;
  SetDeadline(context);
  v1::CancelJobRequest request;
  request.set_id(job->id());
  v1::Job cancelled;
  ASSERT_TRUE(jobs_->CancelJob(&context, request, &cancelled).ok());
  EXPECT_EQ(cancelled.state(), v1::Job::CANCELLING);
  EXPECT_EQ(worker.Synchronize(worker.Request({lease.token()}, 0))->cancel_size(), 1);
  ASSERT_THAT(worker.Synchronize(worker.Request({}, 0)), IsOk());
  EXPECT_EQ(Get(job->id())->state(), v1::Job::CANCELLED);
  EXPECT_THAT(Watch(job->id(), 0), IsOk());
}

TEST_F(ServerTest, LogsAreTailed) {
  const auto job = Create();
  FakeWorker worker(channel_, "w1");
  for (int i = 0; i < 2; ++i) ASSERT_THAT(worker.Run(*worker.Next()), IsOk());
  grpc::ClientContext context;
  SetDeadline(context);
  v1::TailLogsRequest request;
  request.set_id(job->id());
  request.set_path("import/student");
  request.set_follow(true);  // ends all the same, because the task has
  const auto reader = jobs_->TailLogs(&context, request);
  std::string text;
  v1::LogChunk chunk;
  while (reader->Read(&chunk)) text += chunk.text();
  EXPECT_TRUE(reader->Finish().ok());
  EXPECT_EQ(text, "did import/student\n");
}

// Goal: an upload that broke off is resumed at the offset the server names; wrong bytes are refused.
TEST_F(ServerTest, UploadIsResumed) {
  const std::string bytes = std::string(700'000, 'a') + std::string(700'000, 'b');
  const std::string digest = DigestOf(bytes);
  const auto write = [&](uint64_t offset, size_t count, bool finish, const std::string& name) {
    grpc::ClientContext context;
    SetDeadline(context);
    v1::WriteBlobResponse response;
    const auto writer = artifacts_->WriteBlob(&context, &response);
    v1::WriteBlobRequest request;
    request.set_digest(name);
    request.set_size(bytes.size());
    request.set_offset(offset);
    request.set_data(bytes.substr(offset, count));
    request.set_finish(finish);
    writer->Write(request);
    writer->WritesDone();
    return FromGrpc(writer->Finish());
  };
  const auto committed = [&] {
    grpc::ClientContext context;
    SetDeadline(context);
    v1::QueryWriteStatusRequest request;
    request.set_digest(digest);
    v1::QueryWriteStatusResponse response;
    EXPECT_TRUE(artifacts_->QueryWriteStatus(&context, request, &response).ok());
    return response;
  };
  EXPECT_THAT(write(0, 700'000, false, digest), StatusCodeIs(absl::StatusCode::kUnavailable));
  EXPECT_EQ(committed().committed_size(), 700'000);
  StopServer();
  StartServer();
  EXPECT_EQ(committed().committed_size(), 700'000);
  EXPECT_THAT(write(0, 10, false, digest), StatusCodeIs(absl::StatusCode::kOutOfRange));
  EXPECT_THAT(write(700'000, 700'000, true, digest), IsOk());
  EXPECT_TRUE(committed().complete());
  EXPECT_THAT(write(0, bytes.size(), true, DigestOf("x")), StatusCodeIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(write(0, 1, true, "sha256:../../x"), StatusCodeIs(absl::StatusCode::kInvalidArgument));
}

TEST_F(ServerTest, BadRequestsSayWhatIsWrong) {
  v1::Recipe recipe = TinyRecipe();
  recipe.mutable_distill()->set_temperature(-1);
  EXPECT_THAT(Create("", recipe), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("distill.temperature")));
  EXPECT_THAT(Get("nothing"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("nothing")));
  EXPECT_THAT(Watch("nothing", 0), StatusCodeIs(absl::StatusCode::kNotFound));
  FakeWorker nameless(channel_, "");
  EXPECT_THAT(nameless.Next(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("worker.id")));

  v1::CreateJobRequest request;
  *request.mutable_recipe() = TinyRecipe();
  for (const std::string& role : TinyFileRoles()) (*request.mutable_files())[role] = DigestOf("not there");
  grpc::ClientContext context;
  SetDeadline(context);
  v1::Job job;
  EXPECT_THAT(FromGrpc(jobs_->CreateJob(&context, request, &job)),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("not uploaded")));
}

TEST_F(ServerTest, TakenPortAndOpenAddressAreRefused) {
  EXPECT_THAT(Server::Start(coordinator_.get(), {.listen = server_->address()}),
              StatusIs(absl::StatusCode::kUnavailable, HasSubstr(server_->address())));
  EXPECT_THAT(Server::Start(coordinator_.get(), {.listen = "0.0.0.0:0"}),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("--insecure-listen")));
}

// Goal: jobs come in pages, newest first, each once, also when a job is added between two pages.
TEST_F(ServerTest, ListsJobsInPages) {
  std::vector<std::string> expected;
  for (int i = 0; i < 3; ++i) expected.insert(expected.begin(), Create()->id());
  std::vector<std::string> listed;
  v1::ListJobsRequest request;
  request.set_page_size(2);
  do {
    grpc::ClientContext context;
    SetDeadline(context);
    v1::ListJobsResponse response;
    ASSERT_TRUE(jobs_->ListJobs(&context, request, &response).ok());
    for (const v1::Job& job : response.jobs()) listed.push_back(job.id());
    request.set_page_token(response.next_page_token());
    if (listed.size() == 2) {
      ASSERT_THAT(Create(), IsOk());
    }
  } while (!request.page_token().empty());
  EXPECT_EQ(listed, expected);
}

// Goal: many idle workers and watchers hold no thread each: the server still answers.
TEST_F(ServerTest, ManyOpenPollsDoNotStarveOthers) {
  const auto job = Create();
  std::vector<std::thread> threads;
  for (int i = 0; i < 40; ++i) {
    threads.emplace_back([&, i] {
      FakeWorker worker(channel_, Join("w", i));
      EXPECT_THAT(worker.Synchronize(worker.Request({}, 0)), IsOk());
    });
    threads.emplace_back([&] { EXPECT_THAT(Watch(job->id(), 0, 1), IsOk()); });
  }
  EXPECT_THAT(Get(job->id()), IsOk());
  for (std::thread& thread : threads) thread.join();
}

}  // namespace
}  // namespace refinery::api
