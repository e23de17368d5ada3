// tests/simulation/random.h
//
// Random numbers that are the same everywhere (SplitMix64, Steele et al. 2014), in streams that do not disturb each other.

#pragma once

#include <cstdint>
#include <string_view>

namespace refinery::simulation {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  // The stream `name` of `seed`.
  Random(uint64_t seed, std::string_view name) : state_(seed * 0x9E3779B97F4A7C15ull + 1) {
    for (const char c : name) state_ = (state_ ^ static_cast<unsigned char>(c)) * 0x100000001B3ull;
    Next();
  }

  uint64_t Next() {
    uint64_t z = (state_ += 0x9E3779B97F4A7C15ull);
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
    return z ^ (z >> 31);
  }
  // In [low, high].
  int64_t Between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(Next() % static_cast<uint64_t>(high - low + 1));
  }
  double Uniform() { return static_cast<double>(Next() >> 11) * 0x1.0p-53; }
  bool Chance(double probability) { return Uniform() < probability; }

 private:
  uint64_t state_;
};

}  // namespace refinery::simulation
