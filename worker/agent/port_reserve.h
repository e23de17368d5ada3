// worker/agent/port_reserve.h
//
// TCP ports that this worker keeps free, so that a gang can be told where to meet before its first member runs. A kept port is bound and
// not listened on; it is let go just before the program that will listen starts.
//
// Errors: none; a machine without free ports keeps fewer.  Threads: safe for any.

#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <vector>

namespace refinery::agent {

class PortReserve {
 public:
  explicit PortReserve(size_t count);
  ~PortReserve();
  PortReserve(const PortReserve&) = delete;
  PortReserve& operator=(const PortReserve&) = delete;

  // Those that are ours, let go or not.
  std::vector<uint32_t> Ports() const;
  // Lets a program listen on it. One that is not ours is left alone.
  void LetGo(uint32_t port);
  // After that program: the port is kept again, or another one in its place if somebody took it.
  void TakeBack(uint32_t port);

 private:
  mutable std::mutex mutex_;
  std::map<uint32_t, int> sockets_;  // port -> socket; -1 = let go
};

}  // namespace refinery::agent
