// worker/agent/port_reserve.h
//
// TCP ports that this worker keeps free, so that a gang can be told where to meet before its first member runs. A kept port is bound and
// not listened on; it is let go just before the program that will listen starts. From the lease that names it until that program has
// ended it is in use: the coordinator may have given the lease up long before.
//
// Errors: none; a machine without free ports keeps fewer.  Threads: safe for any.

#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <vector>

namespace refinery::agent {

class PortReserve {
 public:
  explicit PortReserve(size_t count);
  ~PortReserve();
  PortReserve(const PortReserve&) = delete;
  PortReserve& operator=(const PortReserve&) = delete;

  // Those that a gang may be told.
  std::vector<uint32_t> Ports() const;
  // A gang has been told `port`, which is returned: it is in use until TakeBack, begun or not.
  uint32_t Use(uint32_t port);
  // Lets a program listen on it. One that is not ours is left alone.
  void LetGo(uint32_t port);
  // After that program, or when it will not be started: the port is kept again, or another one in its place if somebody took it.
  void TakeBack(uint32_t port);

 private:
  mutable std::mutex mutex_;
  std::map<uint32_t, int> sockets_;  // port -> socket; -1 = let go
  std::set<uint32_t> in_use_;
};

}  // namespace refinery::agent
