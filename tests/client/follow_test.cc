// Tests of following a job: a scripted JobService that breaks its streams.

#include "client/follow.h"

#include <grpcpp/server_builder.h>

#include <mutex>

#include "common/channel.h"
#include "tests/support/status_matchers.h"

namespace refinery::client {
namespace {

using ::testing::ElementsAre;
using testing::IsOk;
using testing::StatusCodeIs;

// Events 1 to `last`; every stream breaks after three of them until the end is reached.
class BreakingJobs final : public v1::JobService::Service {
 public:
  grpc::Status WatchJob(grpc::ServerContext*, const v1::WatchJobRequest* request,
                        grpc::ServerWriter<v1::WatchJobResponse>* writer) override {
    std::lock_guard<std::mutex> lock(mutex_);
    ++streams_;
    if (request->id() != "j") return {grpc::StatusCode::NOT_FOUND, "no such job"};
    for (uint64_t seq = request->after_seq() + 1, sent = 0; seq <= kLast; ++seq, ++sent) {
      if (sent == 3) return {grpc::StatusCode::UNAVAILABLE, "restarting"};
      v1::WatchJobResponse item;
      item.mutable_event()->set_seq(seq);
      writer->Write(item);
    }
    return grpc::Status::OK;
  }
  grpc::Status GetJob(grpc::ServerContext*, const v1::GetJobRequest*, v1::Job* job) override {
    std::lock_guard<std::mutex> lock(mutex_);
    job->set_id("j");
    job->set_state(streams_ == 0 ? v1::Job::RUNNING : v1::Job::SUCCEEDED);
    return grpc::Status::OK;
  }
  int streams() {
    std::lock_guard<std::mutex> lock(mutex_);
    return streams_;
  }

  static constexpr uint64_t kLast = 8;

 private:
  std::mutex mutex_;
  int streams_ = 0;
};

class FollowTest : public ::testing::Test {
 protected:
  FollowTest() {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(&jobs_);
    server_ = builder.BuildAndStart();
    address_ = Join("127.0.0.1:", port);
  }

  BreakingJobs jobs_;
  std::unique_ptr<grpc::Server> server_;
  std::string address_;
};

// Goal: every event once and in order, over broken streams.
TEST_F(FollowTest, NoGapAndNoDuplicate) {
  JobStream stream(MakeChannel(address_), "j", 0);
  std::vector<uint64_t> seen;
  for (int i = 0; i < 100 && !stream.ended(); ++i) {
    if (auto item = stream.Next(std::chrono::milliseconds(200)); item.has_value()) seen.push_back(item->event().seq());
  }
  EXPECT_THAT(seen, ElementsAre(1, 2, 3, 4, 5, 6, 7, 8));
  EXPECT_THAT(stream.error(), IsOk());
  EXPECT_GE(jobs_.streams(), 3);
}

TEST_F(FollowTest, AnUnknownJobIsAnError) {
  JobStream stream(MakeChannel(address_), "other", 0);
  EXPECT_FALSE(stream.Next(std::chrono::milliseconds(2000)).has_value());
  EXPECT_THAT(stream.error(), StatusCodeIs(absl::StatusCode::kNotFound));
}

TEST_F(FollowTest, ReturnsTheJobAsItEnded) {
  auto connection = Connect(address_);
  ASSERT_THAT(connection, IsOk());
  auto job = FollowJob(*connection, "j", {});
  ASSERT_THAT(job, IsOk());
  EXPECT_EQ(job->state(), v1::Job::SUCCEEDED);
}

// Goal: how long nobody has answered is known, so that the wait can be bounded.
TEST_F(FollowTest, KnowsThatTheCoordinatorIsAway) {
  server_->Shutdown(std::chrono::system_clock::now());
  JobStream stream(MakeChannel(address_), "j", 0);
  for (int i = 0; i < 50 && stream.away() < std::chrono::milliseconds(300); ++i)
    EXPECT_FALSE(stream.Next(std::chrono::milliseconds(100)).has_value());
  EXPECT_GE(stream.away(), std::chrono::milliseconds(300));
  EXPECT_FALSE(stream.ended());
}

}  // namespace
}  // namespace refinery::client
