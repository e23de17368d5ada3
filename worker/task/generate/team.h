// worker/task/generate/team.h
//
// A few threads that run one function together and meet at barriers within it: a decoding step has some hundred barriers, and
// waking OpenMP threads at each (they sleep, so that neighbours on the machine are not slowed) would cost more than the work.
// Waiting spins for a few microseconds, then sleeps.
//
// Threads: Run may be called by one thread at a time.

#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <thread>
#include <vector>

namespace refinery::generate {

class Team {
 public:
  // `size` threads, the caller of Run being one of them.
  explicit Team(int size);
  ~Team();
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int size() const { return size_; }
  // body(member) on all members at once, member in [0, size); returns when all have returned. body must not throw.
  void Run(const std::function<void(int)>& body);
  // Inside body: returns when all members have called it.
  void Barrier();

 private:
  void Serve(int member);

  const int size_;
  std::atomic<uint32_t> arrived_{0};
  std::atomic<uint32_t> passed_{0};   // barriers so far
  std::atomic<uint32_t> started_{0};  // calls of Run so far
  std::atomic<bool> stopping_{false};
  const std::function<void(int)>* body_ = nullptr;
  std::vector<std::thread> threads_;
};

// The part of [0, total) that member `member` of `size` works on, in multiples of `unit` where possible.
struct Share {
  int64_t begin, end;
};
inline Share ShareOf(int64_t total, int member, int size, int64_t unit = 1) {
  const int64_t units = (total + unit - 1) / unit;
  const int64_t begin = units * member / size * unit, end = units * (member + 1) / size * unit;
  return {begin < total ? begin : total, end < total ? end : total};
}

}  // namespace refinery::generate
