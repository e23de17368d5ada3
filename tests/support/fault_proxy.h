// tests/support/fault_proxy.h
//
// A TCP proxy that breaks connections on purpose: it listens on a loopback port, forwards to another one, and does with the bytes
// what its mode says. One thread accepts, two serve each connection.
//
// Threads: set_mode and Cut from any.

#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <list>
#include <mutex>
#include <string>
#include <thread>

#include "common/status.h"

namespace refinery::testing {

class FaultProxy {
 public:
  enum class Mode {
    kPass,
    kDelay,      // each piece waits `delay` first
    kBlackhole,  // connections stay open, nothing passes in either direction
    kHalfOpen,   // what the client says arrives, what the server says does not
    kRefuse,     // new connections are closed at once (existing ones pass; Cut ends them)
  };

  // Forwards to 127.0.0.1:`port`.
  explicit FaultProxy(int port) : port_(port) {
    listener_ = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in any = Loopback(0);
    RF_CHECK(bind(listener_, reinterpret_cast<sockaddr*>(&any), sizeof(any)) == 0 && listen(listener_, 64) == 0);
    socklen_t size = sizeof(any);
    getsockname(listener_, reinterpret_cast<sockaddr*>(&any), &size);
    address_ = Join("127.0.0.1:", ntohs(any.sin_port));
    acceptor_ = std::thread([this] { Accept(); });
  }
  ~FaultProxy() {
    stopping_ = true;
    acceptor_.join();
    Cut();
    for (std::thread& thread : threads_) thread.join();
    close(listener_);
  }
  FaultProxy(const FaultProxy&) = delete;
  FaultProxy& operator=(const FaultProxy&) = delete;

  const std::string& address() const { return address_; }
  void set_mode(Mode mode, std::chrono::milliseconds delay = std::chrono::milliseconds(0)) {
    delay_ms_ = static_cast<int>(delay.count());
    mode_ = mode;
  }
  // Ends every connection.
  void Cut() {
    std::lock_guard lock(mutex_);
    for (const int fd : open_) shutdown(fd, SHUT_RDWR);
  }

 private:
  static sockaddr_in Loopback(int port) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(static_cast<uint16_t>(port));
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    return address;
  }

  void Accept() {
    while (!stopping_) {
      pollfd ready{.fd = listener_, .events = POLLIN};
      if (poll(&ready, 1, 50) <= 0) continue;
      const int client = accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
      if (client < 0) continue;
      const int server = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
      const sockaddr_in to = Loopback(port_);
      if (mode_ == Mode::kRefuse || connect(server, reinterpret_cast<const sockaddr*>(&to), sizeof(to)) != 0) {
        close(client);
        close(server);
        continue;
      }
      std::lock_guard lock(mutex_);
      open_.push_back(client);
      open_.push_back(server);
      threads_.emplace_back([this, client, server] { Pump(client, server, true); });
      threads_.emplace_back([this, client, server] { Pump(server, client, false); });
    }
  }

  // The sockets stay open until the proxy ends: a number that is used again must not be shut down by mistake.
  void Pump(int from, int to, bool from_client) {
    std::array<char, 65536> buffer;
    for (;;) {
      pollfd ready{.fd = from, .events = POLLIN};
      if (poll(&ready, 1, 50) == 0) {
        if (stopping_) return;
        continue;
      }
      const ssize_t got = recv(from, buffer.data(), buffer.size(), 0);
      if (got <= 0) break;
      const Mode mode = mode_;
      if (mode == Mode::kBlackhole || (mode == Mode::kHalfOpen && !from_client)) continue;
      if (mode == Mode::kDelay) std::this_thread::sleep_for(std::chrono::milliseconds(delay_ms_));
      for (ssize_t done = 0; done < got;) {
        const ssize_t put = send(to, buffer.data() + done, static_cast<size_t>(got - done), MSG_NOSIGNAL);
        if (put <= 0) break;
        done += put;
      }
    }
    shutdown(to, SHUT_RDWR);
  }

  const int port_;
  int listener_ = -1;
  std::string address_;
  std::atomic<Mode> mode_{Mode::kPass};
  std::atomic<int> delay_ms_{0};
  std::atomic<bool> stopping_{false};
  std::mutex mutex_;
  std::list<int> open_;             // guarded
  std::list<std::thread> threads_;  // guarded until acceptor_ has ended
  std::thread acceptor_;
};

}  // namespace refinery::testing
