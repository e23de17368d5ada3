#include "worker/agent/port_reserve.h"

#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>

#include <utility>

namespace refinery::agent {
namespace {

// A socket bound to `port` on every address; port 0 = any that is free. {0, -1} when there is none.
std::pair<uint32_t, int> Bind(uint32_t port) {
  const int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return {0, -1};
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_ANY);
  address.sin_port = htons(static_cast<uint16_t>(port));
  socklen_t size = sizeof(address);
  if (::bind(fd, reinterpret_cast<sockaddr*>(&address), size) == 0 &&
      ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) == 0) {
    return {ntohs(address.sin_port), fd};
  }
  ::close(fd);
  return {0, -1};
}

}  // namespace

PortReserve::PortReserve(size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (const auto bound = Bind(0); bound.second >= 0) sockets_.insert(bound);
  }
}

PortReserve::~PortReserve() {
  for (const auto& [port, fd] : sockets_) {
    if (fd >= 0) ::close(fd);
  }
}

std::vector<uint32_t> PortReserve::Ports() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::vector<uint32_t> ports;
  for (const auto& [port, fd] : sockets_) {
    if (!in_use_.contains(port)) ports.push_back(port);
  }
  return ports;
}

uint32_t PortReserve::Use(uint32_t port) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (sockets_.contains(port)) in_use_.insert(port);
  return port;
}

void PortReserve::LetGo(uint32_t port) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto found = sockets_.find(port);
  if (found == sockets_.end() || found->second < 0) return;
  ::close(std::exchange(found->second, -1));
}

void PortReserve::TakeBack(uint32_t port) {
  std::lock_guard<std::mutex> lock(mutex_);
  in_use_.erase(port);
  const auto found = sockets_.find(port);
  if (found == sockets_.end() || found->second >= 0) return;
  sockets_.erase(found);
  std::pair<uint32_t, int> bound = Bind(port);
  if (bound.second < 0) bound = Bind(0);
  if (bound.second >= 0) sockets_.insert(bound);
}

}  // namespace refinery::agent
