#include "worker/task/generate/team.h"

namespace refinery::generate {
namespace {

constexpr int kSpins = 4000;  // about 50 microseconds before a waiter goes to sleep

// Returns when `value` differs from `old`.
void WaitWhile(const std::atomic<uint32_t>& value, uint32_t old) {
  for (int i = 0; i < kSpins; ++i) {
    if (value.load(std::memory_order_acquire) != old) return;
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

}  // namespace

Team::Team(int size) : size_(size < 1 ? 1 : size) {
  for (int member = 1; member < size_; ++member) threads_.emplace_back([this, member] { Serve(member); });
}

Team::~Team() {
  stopping_.store(true);
  started_.fetch_add(1, std::memory_order_release);
  started_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Team::Serve(int member) {
  for (uint32_t seen = 0;; ++seen) {
    WaitWhile(started_, seen);
    if (stopping_.load()) return;
    (*body_)(member);
    Barrier();
  }
}

void Team::Run(const std::function<void(int)>& body) {
  if (size_ == 1) return body(0);
  body_ = &body;
  started_.fetch_add(1, std::memory_order_release);
  started_.notify_all();
  body(0);
  Barrier();
}

void Team::Barrier() {
  if (size_ == 1) return;
  const uint32_t generation = passed_.load(std::memory_order_acquire);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == static_cast<uint32_t>(size_)) {
    arrived_.store(0, std::memory_order_relaxed);
    passed_.store(generation + 1, std::memory_order_release);
    passed_.notify_all();
  } else {
    WaitWhile(passed_, generation);
  }
}

}  // namespace refinery::generate
