#include "worker/agent/machine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <fstream>

#include "common/files.h"
#include "common/temporary_folder.h"
#include "tests/support/status_matchers.h"
#include "worker/agent/artifact_cache.h"
#include "worker/agent/port_reserve.h"

namespace refinery::agent {
namespace {

using testing::IsOk;
using testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Pair;

TEST(MachineTest, LabelsAreKeysAndValues) {
  const auto labels = ParseLabels({"zone=a", "example.com/rack=7", "empty="});
  ASSERT_THAT(labels, IsOk());
  EXPECT_THAT(*labels, ElementsAre(Pair("empty", ""), Pair("example.com/rack", "7"), Pair("zone", "a")));
  for (const char* wrong : {"zone", "=a", "zone=a b", "zo ne=a", "zone=a=b"}) {
    EXPECT_THAT(ParseLabels({wrong}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("KEY=VALUE"))) << wrong;
  }
  EXPECT_THAT(ParseLabels({Join("k=", std::string(63, 'v'))}), IsOk());
  EXPECT_THAT(ParseLabels({Join("k=", std::string(64, 'v'))}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("63")));
  EXPECT_THAT(ParseLabels({"a=1", "a=2"}), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("twice")));
  std::map<std::string, std::string> many;
  for (int i = 0; i < 64; ++i) many[Join("k", i)] = "v";
  EXPECT_THAT(CheckLabels(many), IsOk());
  many["k64"] = "v";
  EXPECT_THAT(CheckLabels(many), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("at most 64")));
}

// Goal: without the driver's library its files name the devices, in the order of their bus addresses.  Method: a folder like the
// kernel's with more devices than this machine can have.
TEST(MachineTest, FilesOfTheDriverNameTheDevices) {
  const auto made = TemporaryFolder::Make("machine");
  ASSERT_THAT(made, IsOk());
  const std::filesystem::path folder = made->path();
  EXPECT_THAT(Accelerators(folder), IsEmpty());
  EXPECT_THAT(Accelerators(folder / "missing"), IsEmpty());
  constexpr int kCount = 40;
  for (int i = 0; i < kCount; ++i) {
    const std::filesystem::path device = folder / Join("0000:", 10 + i, ":00.0");
    std::filesystem::create_directory(device);
    std::ofstream(device / "information") << "Model: \t\t NVIDIA H" << i << "\nIRQ:   \t\t 5\n";
  }
  const std::vector<v1::Device> devices = Accelerators(folder);
  ASSERT_EQ(devices.size(), kCount);
  EXPECT_EQ(devices[7].name(), "cuda:7");
  EXPECT_EQ(devices[7].model(), "NVIDIA H7");
  EXPECT_EQ(devices[7].memory_bytes(), 0u);
}

TEST(MachineTest, DescribesThisMachine) {
  v1::WorkerInfo info;
  DescribeMachine(&info);
  EXPECT_GT(info.memory_bytes(), uint64_t{64} << 20);
  ASSERT_GE(info.devices_size(), 1);
  EXPECT_EQ(info.devices(0), "cpu");
  EXPECT_EQ(info.devices_size(), info.device_details_size() + 1);
  EXPECT_GT(FreeDiskBytes("/tmp"), 0u);
  EXPECT_EQ(FreeDiskBytes("/no/such/folder"), 0u);
}

bool CanListen(uint32_t port) {
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(port));
  const bool ok = ::bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0 && ::listen(fd, 1) == 0;
  ::close(fd);
  return ok;
}

// Goal: a kept port belongs to nobody else, one that was let go to whoever listens first, and one that is taken is replaced.
TEST(PortReserveTest, KeepsPortsUntilTheyAreLetGo) {
  PortReserve reserve(2);
  const std::vector<uint32_t> ports = reserve.Ports();
  ASSERT_EQ(ports.size(), 2);
  EXPECT_FALSE(CanListen(ports[0]));
  reserve.LetGo(ports[0]);
  EXPECT_TRUE(CanListen(ports[0]));
  EXPECT_EQ(reserve.Ports(), ports);
  reserve.TakeBack(ports[0]);
  EXPECT_EQ(reserve.Ports(), ports);
  EXPECT_FALSE(CanListen(ports[0]));
  reserve.LetGo(ports[1]);
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(static_cast<uint16_t>(ports[1]));
  ASSERT_EQ(::bind(fd, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  reserve.TakeBack(ports[1]);
  const std::vector<uint32_t> now = reserve.Ports();
  EXPECT_EQ(now.size(), 2);
  EXPECT_EQ(std::count(now.begin(), now.end(), ports[1]), 0);
  ::close(fd);
  reserve.LetGo(1);  // not ours
  reserve.TakeBack(0);
  EXPECT_EQ(reserve.Ports(), now);
}

// Goal: the newest come first, a bound holds, and what is no artifact is left out.
TEST(ArtifactCacheTest, ListsTheNewest) {
  const auto made = TemporaryFolder::Make("cache");
  ASSERT_THAT(made, IsOk());
  const std::filesystem::path folder = made->path();
  const auto digest = [](char c) { return Join("sha256:", std::string(64, c)); };
  const auto now = std::filesystem::file_time_type::clock::now();
  for (const char c : {'a', 'b', 'c'}) {
    const std::filesystem::path path = folder / std::string(64, c);
    std::filesystem::create_directory(path);
    std::filesystem::last_write_time(path, now - std::chrono::hours(c == 'b' ? 1 : c == 'a' ? 2 : 3));
  }
  std::filesystem::create_directory(folder / ".locks");
  std::ofstream(folder / std::string(64, 'd')) << "a file";
  ArtifactCache cache(folder);
  EXPECT_THAT(cache.Newest(9), ElementsAre(digest('b'), digest('a'), digest('c')));
  EXPECT_THAT(cache.Newest(2), ElementsAre(digest('b'), digest('a')));
  const std::filesystem::path fresh = folder / "work";
  std::filesystem::create_directory(fresh);
  cache.Adopt(digest('e'), fresh);
  EXPECT_THAT(cache.Newest(2), ElementsAre(digest('e'), digest('b')));
}

}  // namespace
}  // namespace refinery::agent
