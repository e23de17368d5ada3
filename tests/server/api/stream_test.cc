// Streams that break off: a watch goes on from its last number without a gap or a duplicate, a log from attempt to attempt.

#include <gmock/gmock.h>
#include <google/protobuf/text_format.h>
#include <gtest/gtest.h>

#include <atomic>
#include <random>
#include <thread>

#include "common/channel.h"
#include "tests/server/api/fake_worker.h"
#include "tests/server/api/test_server.h"
#include "tests/support/status_matchers.h"

namespace refinery::api {
namespace {

using refinery::testing::Caller;
using refinery::testing::FakeWorker;
using refinery::testing::IsOk;
using refinery::testing::TestServer;

// The same events, the same text: a map's entries have no order on the wire.
std::string TextOf(const v1::Event& event) {
  std::string text;
  google::protobuf::TextFormat::PrintToString(event, &text);
  return text;
}

// The events after `after_seq`, at most `limit`; `ended` when the stream said that this was all.
std::vector<std::string> Watch(Caller& caller, const std::string& id, uint64_t& after_seq, size_t limit, bool* ended) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
  v1::WatchJobRequest request;
  request.set_id(id);
  request.set_after_seq(after_seq);
  const auto stream = caller.jobs().WatchJob(&context, request);
  std::vector<std::string> events;
  v1::WatchJobResponse response;
  while (events.size() < limit && stream->Read(&response)) {
    if (!response.has_event()) continue;
    after_seq = response.event().seq();
    events.push_back(TextOf(response.event()));
  }
  const bool full = events.size() == limit;
  if (full) context.TryCancel();
  const grpc::Status status = stream->Finish();
  *ended = !full && status.ok();
  return events;
}

std::vector<std::string> WatchAll(Caller& caller, const std::string& id, std::mt19937& random, size_t longest) {
  std::vector<std::string> all;
  uint64_t after_seq = 0;
  bool ended = false;
  for (int i = 0; i < 10'000 && !ended; ++i) {
    const auto part = Watch(caller, id, after_seq, random() % longest + 1, &ended);
    all.insert(all.end(), part.begin(), part.end());
  }
  EXPECT_TRUE(ended);
  return all;
}

void RunJob(Caller& caller, const std::string& id) {
  FakeWorker worker(caller.channel(), "w1");
  for (int i = 0; i < 300; ++i) {
    const auto lease = worker.Next();
    ASSERT_THAT(lease, IsOk());
    if (!lease->token().path().empty()) {
      ASSERT_THAT(worker.Run(*lease), IsOk());
    } else if (caller.Get(id)->state() >= v1::Job::SUCCEEDED) {
      return;
    }
  }
  FAIL() << "the job did not end";
}

// Goal: however often a watch is cut, the events it brings are those of an uncut one, each once, in order.  Method: watchers that cut
// themselves after random counts, some while the job runs, against one that reads it all at the end; field by field.
TEST(StreamTest, WatchResumesWithoutGapOrDuplicate) {
  TestServer server;
  ASSERT_THAT(server.Start(), IsOk());
  Caller caller(MakeChannel(server.address()));
  const auto job = caller.Create();
  ASSERT_THAT(job, IsOk());
  std::vector<std::vector<std::string>> live(4);
  std::vector<std::thread> watchers;
  for (size_t i = 0; i < live.size(); ++i) {
    watchers.emplace_back([&, i] {
      std::mt19937 random(static_cast<unsigned>(i));
      Caller own(MakeChannel(server.address()));
      live[i] = WatchAll(own, job->id(), random, 7);
    });
  }
  RunJob(caller, job->id());
  for (std::thread& watcher : watchers) watcher.join();
  uint64_t after_seq = 0;
  bool ended = false;
  const std::vector<std::string> whole = Watch(caller, job->id(), after_seq, 1'000'000, &ended);
  EXPECT_TRUE(ended);
  EXPECT_EQ(whole.size(), caller.Get(job->id())->as_of_seq());
  for (const auto& events : live) EXPECT_TRUE(events == whole);  // EXPECT_EQ would print all of them
  std::mt19937 random(9);
  for (const size_t longest : {1, 2, 50}) EXPECT_TRUE(WatchAll(caller, job->id(), random, longest) == whole) << longest;
}

// Goal: a followed log goes over from one attempt to the next, each line once, also when the worker repeats what it sent.
TEST(StreamTest, LogFollowsFromAttemptToAttempt) {
  TestServer server;
  ASSERT_THAT(server.Start(), IsOk());
  Caller caller(MakeChannel(server.address()));
  const auto job = caller.Create();
  ASSERT_THAT(job, IsOk());
  FakeWorker worker(caller.channel(), "w1");
  std::vector<v1::LogChunk> chunks;
  std::thread tail([&] {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(20));
    v1::TailLogsRequest request;
    request.set_id(job->id());
    request.set_path("import/student");
    request.set_follow(true);
    const auto stream = caller.jobs().TailLogs(&context, request);
    v1::LogChunk chunk;
    while (stream->Read(&chunk)) chunks.push_back(chunk);
    EXPECT_TRUE(stream->Finish().ok());
  });
  for (int attempt = 1; attempt <= 3; ++attempt) {
    v1::Lease lease;
    for (int i = 0; i < 40 && lease.token().path() != "import/student"; ++i) lease = *worker.Next();
    ASSERT_EQ(lease.attempt(), static_cast<uint32_t>(attempt));
    v1::SynchronizeRequest running = worker.Request({lease.token()}, 0);
    running.mutable_running(0)->set_log("hello ");
    for (int repeat = 0; repeat < 2; ++repeat) ASSERT_THAT(worker.Synchronize(running), IsOk());
    v1::CompleteTaskRequest end;
    if (attempt < 3) {
      *end.mutable_lease() = lease.token();
      end.mutable_error()->set_failure_class(v1::INFRA);
      end.mutable_error()->set_message("the machine went away");
    } else {
      end = *worker.MakeSuccess(lease);
    }
    end.set_log_offset(6);
    end.set_log(Join("from attempt ", attempt, "\n"));
    ASSERT_THAT(worker.Complete(end), IsOk());
  }
  tail.join();
  std::map<uint32_t, std::string> texts;
  uint32_t last = 0;
  for (const v1::LogChunk& chunk : chunks) {
    EXPECT_GE(chunk.attempt(), last);
    last = chunk.attempt();
    EXPECT_EQ(chunk.offset(), texts[chunk.attempt()].size());
    texts[chunk.attempt()] += chunk.text();
  }
  for (uint32_t attempt = 1; attempt <= 3; ++attempt) EXPECT_EQ(texts[attempt], Join("hello from attempt ", attempt, "\n"));
}

// Goal: SIGTERM's way out: streams and polls are answered at once with a word that says to come back, and nothing hangs.
TEST(StreamTest, ShutdownAnswersWhoWaits) {
  TestServer server;
  ASSERT_THAT(server.Start(), IsOk());
  Caller caller(MakeChannel(server.address()));
  const auto job = caller.Create();
  ASSERT_THAT(job, IsOk());
  std::atomic<bool> watching{false};
  Status ended;
  std::thread watcher([&] {
    grpc::ClientContext context;
    v1::WatchJobRequest request;
    request.set_id(job->id());
    const auto stream = caller.jobs().WatchJob(&context, request);
    v1::WatchJobResponse response;
    while (stream->Read(&response)) watching = true;
    ended = FromGrpc(stream->Finish());
  });
  while (!watching) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  const auto start = std::chrono::steady_clock::now();
  server.Stop();
  watcher.join();
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(10));
  EXPECT_TRUE(absl::IsUnavailable(ended)) << ended;
}

}  // namespace
}  // namespace refinery::api
