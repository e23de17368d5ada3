// tests/simulation/fake_log.h
//
// An event log in memory with the failings of a disk: what was not synced may be lost or torn at a crash, and the disk may be
// full. Batches are framed with their length and a checksum, so that recovery keeps whole ones only, as a transaction does.

#pragma once

#include <string>

#include "common/status.h"
#include "server/jobs/core.h"
#include "tests/simulation/random.h"

namespace refinery::simulation {

class FakeLog {
 public:
  // Puts a batch behind what is there, not durable yet. RESOURCE_EXHAUSTED when the disk is full; nothing is kept then.
  Status Write(const jobs::Events& events);
  // Makes what was written durable.
  void Sync() { synced_ = bytes_.size(); }
  // The machine's memory is gone: a prefix of what was not synced may survive, of any length.
  void Crash(Random& random);
  void set_full(bool full) { full_ = full; }

  // Every event of whole batches; what lies behind them is cut off.
  StatusOr<jobs::Events> Recover();
  // Forgets the events that a snapshot stands for. Only when everything is synced.
  void Compact();
  size_t size() const { return bytes_.size(); }

 private:
  std::string bytes_;
  size_t synced_ = 0;
  bool full_ = false;
};

}  // namespace refinery::simulation
