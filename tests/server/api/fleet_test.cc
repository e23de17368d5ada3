#include "server/api/fleet.h"

#include <gmock/gmock.h>
#include <grpcpp/channel.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "common/channel.h"
#include "tests/server/api/fake_worker.h"
#include "tests/server/api/test_server.h"
#include "tests/support/status_matchers.h"

namespace refinery::api {
namespace {

using refinery::testing::IsOk;

v1::SynchronizeRequest Full(const std::string& incarnation) {
  v1::SynchronizeRequest request;
  request.mutable_worker()->set_id("w");
  request.mutable_worker()->set_free_disk_bytes(10);
  (*request.mutable_worker()->mutable_labels())["zone"] = "a";
  request.set_incarnation(incarnation);
  return request;
}

v1::SynchronizeRequest Brief(const std::string& incarnation, uint64_t free_disk) {
  v1::SynchronizeRequest request;
  request.mutable_worker()->set_id("w");
  request.mutable_worker()->set_brief(true);
  request.mutable_worker()->set_state("draining");
  request.mutable_worker()->set_free_disk_bytes(free_disk);
  request.set_incarnation(incarnation);
  return request;
}

// Goal: what a worker said once stays known while it is brief, of the same incarnation only.
TEST(FleetTest, KeepsWhatAWorkerIs) {
  Fleet fleet(Milliseconds(1000));
  EXPECT_FALSE(fleet.Seen(Brief("one", 5), Milliseconds(0)));  // as after a restart of the coordinator
  EXPECT_EQ(fleet.Workers(Milliseconds(0)).at(0).info, nullptr);
  EXPECT_TRUE(fleet.Seen(Full("one"), Milliseconds(1)));
  EXPECT_TRUE(fleet.Seen(Brief("one", 7), Milliseconds(2)));
  const std::vector<scheduler::Worker> workers = fleet.Workers(Milliseconds(2));
  ASSERT_EQ(workers.size(), 1);
  EXPECT_EQ(workers[0].info->labels().at("zone"), "a");
  EXPECT_EQ(workers[0].info->free_disk_bytes(), 7);
  EXPECT_TRUE(workers[0].draining);
  EXPECT_EQ(fleet.List(Milliseconds(2)).at(0).labels().at("zone"), "a");
  EXPECT_FALSE(fleet.Seen(Brief("two", 7), Milliseconds(3)));
  EXPECT_EQ(fleet.Workers(Milliseconds(3)).at(0).info, nullptr);
}

// Goal: how many attempts a worker takes stays known while some of them are neither free nor running, for this incarnation only.
TEST(FleetTest, KeepsTheSlotsThatAWorkerHas) {
  Fleet fleet(Milliseconds(1000));
  v1::SynchronizeRequest request = Full("one");
  request.set_free_slots(2);
  request.add_running();
  fleet.Seen(request, Milliseconds(0));
  EXPECT_EQ(fleet.Workers(Milliseconds(0)).at(0).slots, 3u);
  fleet.Seen(Brief("one", 7), Milliseconds(1));
  EXPECT_EQ(fleet.Workers(Milliseconds(1)).at(0).slots, 3u);
  fleet.Seen(Full("two"), Milliseconds(2));
  EXPECT_EQ(fleet.Workers(Milliseconds(2)).at(0).slots, 0u);
}

// Goal: a message that was overtaken by a later one, or by a later life of its worker, is answered at once, gets no lease, and leaves the
// poll of the later one open.
TEST(StaleTest, AnOvertakenPollTakesNothing) {
  refinery::testing::TestServer server;
  ASSERT_THAT(server.Start(), IsOk());
  const std::shared_ptr<grpc::Channel> channel = MakeChannel(server.address());
  refinery::testing::FakeWorker first(channel, "w", "i1"), second(channel, "w", "i2");
  const auto say = [](refinery::testing::FakeWorker& worker, uint64_t revision, uint32_t slots = 1,
                      const std::vector<v1::LeaseToken>& running = {}) {
    v1::SynchronizeRequest request = worker.Request(running, slots);
    request.set_revision(revision);
    return worker.Synchronize(request);
  };
  ASSERT_THAT(say(first, 2), IsOk());
  std::chrono::steady_clock::duration open{};
  std::thread newer([&] {
    const auto start = std::chrono::steady_clock::now();
    EXPECT_THAT(say(first, 3), IsOk());
    open = std::chrono::steady_clock::now() - start;
  });
  for (int i = 0; i < 5; ++i) {
    std::this_thread::sleep_for(Milliseconds(20));
    EXPECT_THAT(say(first, 1), IsOk());
  }
  newer.join();
  EXPECT_GE(open, Milliseconds(190));  // a long poll of 200 ms

  ASSERT_THAT(refinery::testing::Caller(channel).Create(), IsOk());
  const auto overtaken = say(first, 1);
  ASSERT_THAT(overtaken, IsOk());
  EXPECT_EQ(overtaken->grants_size(), 0);
  EXPECT_TRUE(overtaken->repeat_report());
  ASSERT_THAT(say(second, 1, 0), IsOk());
  v1::LeaseToken token;
  token.set_job("of another time");
  const auto old_life = say(first, 9, 1, {token});
  ASSERT_THAT(old_life, IsOk());
  EXPECT_EQ(old_life->grants_size(), 0);
  EXPECT_EQ(old_life->cancel_size(), 1);
  const auto current = say(second, 2);
  ASSERT_THAT(current, IsOk());
  EXPECT_EQ(current->grants_size(), 1);
}

// Goal: a gang is granted when all its members fit, at one time, each with its rank and one place to meet; when one fails the others are told
// to stop.  Method: two workers with one slot each poll over real gRPC.
TEST(GangTest, IsGrantedWholeAndTakenBackWhole) {
  refinery::testing::TestServer server;
  ASSERT_THAT(server.Start(), IsOk());
  const std::shared_ptr<grpc::Channel> channel = MakeChannel(server.address());
  v1::CreateJobRequest request;
  *request.mutable_recipe() = refinery::testing::TinyRecipe();
  request.mutable_recipe()->mutable_data()->mutable_synthesize()->set_shards(2);
  (*request.mutable_policy()->mutable_by_kind())["synthesize"].set_gang(2);
  ASSERT_THAT(refinery::testing::Caller(channel).Create(request), IsOk());
  refinery::testing::FakeWorker one(channel, "one"), two(channel, "two");
  const auto poll = [](refinery::testing::FakeWorker& worker, uint32_t port, uint32_t slots = 1) {
    v1::SynchronizeRequest asks = worker.Request({}, slots);
    asks.mutable_worker()->set_address("host.example");
    if (port > 0) asks.mutable_worker()->add_ports(port);
    return worker.Synchronize(asks);
  };
  // Alone the first worker gets the import and then nothing.
  for (int i = 0; i < 5; ++i) {
    const auto response = poll(one, 0);
    ASSERT_THAT(response, IsOk());
    for (const v1::Lease& lease : response->grants()) {
      ASSERT_FALSE(lease.token().path().starts_with("synthesize/")) << lease.token().path();
      ASSERT_THAT(one.Run(lease), IsOk());
    }
  }
  std::vector<v1::Lease> leases(2);
  std::atomic<bool> granted{false};
  const auto ask = [&](refinery::testing::FakeWorker& worker, uint32_t port, v1::Lease* lease) {
    for (int i = 0; i < 50 && !granted; ++i) {
      const auto response = poll(worker, port);
      if (!response.ok() || response->grants().empty()) continue;
      *lease = response->grants(0);
      granted = true;
    }
  };
  std::thread first([&] { ask(one, 0, &leases[0]); });
  std::thread second([&] { ask(two, 4711, &leases[1]); });
  first.join();
  second.join();
  for (const v1::Lease& lease : leases) {
    EXPECT_EQ(lease.gang().world_size(), 2u);
    EXPECT_EQ(lease.gang().address(), "host.example");
    EXPECT_EQ(lease.gang().port(), 4711u);
  }
  EXPECT_EQ(leases[0].gang().rank(), 1u);  // the one that keeps a port comes first
  EXPECT_EQ(leases[1].gang().rank(), 0u);
  v1::CompleteTaskRequest failed;
  *failed.mutable_lease() = leases[1].token();
  failed.mutable_error()->set_failure_class(v1::INFRA);
  ASSERT_THAT(two.Complete(failed), IsOk());
  const auto told = one.Synchronize(one.Request({leases[0].token()}, 0));
  ASSERT_THAT(told, IsOk());
  EXPECT_EQ(told->cancel_size(), 1);
  EXPECT_THAT(one.Run(leases[0]), refinery::testing::StatusCodeIs(absl::StatusCode::kAborted));
}

// Goal: an old connection is given up by the server between calls, and the caller notices nothing but a new one.
TEST(ConnectionTest, OldConnectionsAreMadeAnew) {
  refinery::testing::TestServer server;
  ASSERT_THAT(server.Start({.connection_age = std::chrono::seconds(1), .connection_grace = std::chrono::seconds(1)}), IsOk());
  const std::shared_ptr<grpc::Channel> channel = MakeChannel(server.address());
  refinery::testing::Caller caller(channel);
  ASSERT_THAT(caller.Version(), IsOk());
  ASSERT_EQ(channel->GetState(false), GRPC_CHANNEL_READY);
  grpc_connectivity_state state = GRPC_CHANNEL_READY;
  const auto start = std::chrono::steady_clock::now();
  while (state == GRPC_CHANNEL_READY && std::chrono::steady_clock::now() - start < std::chrono::seconds(5)) {
    std::this_thread::sleep_for(Milliseconds(20));
    state = channel->GetState(false);
  }
  EXPECT_NE(state, GRPC_CHANNEL_READY);
  for (int i = 0; i < 100; ++i) {
    EXPECT_THAT(caller.Version(), IsOk());
    std::this_thread::sleep_for(Milliseconds(20));
  }
}

}  // namespace
}  // namespace refinery::api
