#include "server/config/config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <array>
#include <cstddef>
#include <cstdlib>
#include <cstring>

#include "common/config_file.h"
#include "common/files.h"
#include "common/temporary_folder.h"
#include "server/config/notify.h"
#include "tests/support/status_matchers.h"

namespace refinery::config {
namespace {

using refinery::testing::IsOk;
using refinery::testing::StatusCodeIs;
using refinery::testing::StatusIs;
using ::testing::HasSubstr;

v1::CoordinatorConfig Good() {
  v1::CoordinatorConfig config = DefaultConfig();
  config.set_state("/tmp/state");
  return config;
}

// Goal: the marks of a full disk can be set, in their order, within their bounds.
TEST(ConfigTest, MarksOfAFullDisk) {
  EXPECT_THAT(CheckConfig(Good()), IsOk());
  v1::CoordinatorConfig config = Good();
  config.set_disk_full_percent(97);
  config.set_disk_full_free_gib(5);
  EXPECT_THAT(CheckConfig(config), IsOk());
  config.set_disk_full_percent(97.1);
  EXPECT_THAT(CheckConfig(config), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("disk_full_percent")));
  config = Good();
  config.set_disk_read_only_free_gib(20.5);
  EXPECT_THAT(CheckConfig(config), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("disk_read_only_free_gib")));
  config = Good();
  config.set_disk_read_only_percent(100.5);
  EXPECT_THAT(CheckConfig(config), StatusCodeIs(absl::StatusCode::kInvalidArgument));
  config = Good();
  config.set_disk_full_free_gib(-1);
  EXPECT_THAT(CheckConfig(config), StatusCodeIs(absl::StatusCode::kInvalidArgument));
}

// Goal: an address is HOST:PORT, since gRPC itself takes 443 for a missing port and wraps large ones.
TEST(ConfigTest, AddressesHavePorts) {
  for (const char* bad : {"127.0.0.1", "127.0.0.1:99999", "127.0.0.1:abc", ":7433", "::1:7433", ""}) {
    v1::CoordinatorConfig config = Good();
    config.set_listen(bad);
    EXPECT_THAT(CheckConfig(config), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("listen must be HOST:PORT"))) << bad;
    config = Good();
    config.set_metrics_address(bad);
    EXPECT_THAT(CheckConfig(config), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("metrics_address must be"))) << bad;
  }
  for (const char* good : {"127.0.0.1:0", "[::1]:7433", "localhost:65535", "unix:/tmp/socket"}) {
    v1::CoordinatorConfig config = Good();
    config.set_listen(good);
    EXPECT_THAT(CheckConfig(config), IsOk()) << good;
  }
}

// Goal: flag, variable and file reach the same setting, in this order.
TEST(ConfigTest, MarksComeFromFileVariableAndFlag) {
  const auto folder = TemporaryFolder::Make("config");
  ASSERT_THAT(folder, IsOk());
  const std::string file = Join(folder->path(), "/refineryd.yaml");
  ASSERT_THAT(WriteFileAtomically(file, "state: /tmp/s\ndisk_full_percent: 80\ndisk_full_free_gib: 0\ndisk_read_only_free_gib: 0\n"), IsOk());
  const char* argv[] = {"refineryd", "--config", file.c_str(), "--disk-full-percent", "85.5"};
  setenv("REFINERYD_DISK_READ_ONLY_PERCENT", "95", 1);
  const auto line = ReadCommandLine(5, const_cast<char**>(argv));
  unsetenv("REFINERYD_DISK_READ_ONLY_PERCENT");
  ASSERT_THAT(line, IsOk());
  EXPECT_EQ(line->config.disk_full_percent(), 85.5);
  EXPECT_EQ(line->config.disk_read_only_percent(), 95);
  EXPECT_EQ(line->config.disk_full_free_gib(), 0);
  EXPECT_EQ(DefaultConfig().disk_full_free_gib(), 20);
}

// A socket that takes notifications.
class Supervisor {
 public:
  explicit Supervisor(const std::string& name) : fd_(::socket(AF_UNIX, SOCK_DGRAM, 0)) {
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path, name.data(), name.size());
    if (name[0] == '@') address.sun_path[0] = '\0';
    EXPECT_EQ(::bind(fd_, reinterpret_cast<sockaddr*>(&address),
                     static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + name.size())), 0);
    setenv("NOTIFY_SOCKET", name.c_str(), 1);
  }
  ~Supervisor() {
    unsetenv("NOTIFY_SOCKET");
    ::close(fd_);
  }
  std::string Next() {
    std::array<char, 256> bytes{};
    pollfd ready{fd_, POLLIN, 0};
    if (::poll(&ready, 1, 2'000) != 1) return "nothing";
    const ssize_t n = ::recv(fd_, bytes.data(), bytes.size(), 0);
    return n < 0 ? "an error" : std::string(bytes.data(), static_cast<size_t>(n));
  }

 private:
  const int fd_;
};

TEST(NotifyTest, SendsADatagramToWhoeverStartedUs) {
  EXPECT_THAT(NotifySupervisor("READY=1"), IsOk());  // nobody did
  const auto folder = TemporaryFolder::Make("notify");
  ASSERT_THAT(folder, IsOk());
  {
    Supervisor supervisor(Join(folder->path(), "/socket"));
    EXPECT_THAT(NotifySupervisor("READY=1"), IsOk());
    EXPECT_EQ(supervisor.Next(), "READY=1");
  }
  {
    Supervisor supervisor(Join("@refinery-test-", ::getpid()));
    EXPECT_THAT(NotifySupervisor("STOPPING=1"), IsOk());
    EXPECT_EQ(supervisor.Next(), "STOPPING=1");
  }
  setenv("NOTIFY_SOCKET", "relative", 1);
  EXPECT_THAT(NotifySupervisor("READY=1"), StatusCodeIs(absl::StatusCode::kInvalidArgument));
  setenv("NOTIFY_SOCKET", Join("/", std::string(200, 'x')).c_str(), 1);
  EXPECT_THAT(NotifySupervisor("READY=1"), StatusCodeIs(absl::StatusCode::kInvalidArgument));
  setenv("NOTIFY_SOCKET", Join(folder->path(), "/missing").c_str(), 1);
  EXPECT_THAT(NotifySupervisor("READY=1"), StatusCodeIs(absl::StatusCode::kUnavailable));
  unsetenv("NOTIFY_SOCKET");
}

}  // namespace
}  // namespace refinery::config
