// worker/task/data/random.h
//
// Two random streams whose values are the same on every platform and never depend on time:
// SeededRandom for our own choices, PythonRandom where few-shot examples must be those that lm-evaluation-harness draws.
//
// Source: splitmix64 (Steele et al. 2014); CPython's random module (Mersenne Twister seeded by init_by_array, getrandbits,
// _randbelow_with_getrandbits, sample).  Threads: one object, one thread.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace refinery::data {

class SeededRandom {
 public:
  explicit SeededRandom(uint64_t seed) : state_(seed) {}
  uint64_t Next();
  // Uniform in [0, n); n > 0.
  uint64_t Below(uint64_t n);
  // A permutation of 0 .. n-1.
  std::vector<size_t> Permutation(size_t n);
  // k different indices below n (all of them, shuffled, when k >= n).
  std::vector<size_t> Sample(size_t n, size_t k);

 private:
  uint64_t state_;
};

// random.Random(seed) of CPython 3 for seeds below 2^32.
class PythonRandom {
 public:
  explicit PythonRandom(uint32_t seed);
  uint32_t Next();                    // the raw 32-bit output
  // random.sample(range(n), k); k <= n < 2^32.
  std::vector<size_t> Sample(size_t n, size_t k);
  // random.random(): 53 bits in [0, 1). random.choices(xs) draws xs[int(random.random() * len(xs))].
  double Double();

 private:
  size_t Below(size_t n);

  std::array<uint32_t, 624> state_;
  size_t index_ = 624;
};

}  // namespace refinery::data
