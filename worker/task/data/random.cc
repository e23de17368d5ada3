#include "worker/task/data/random.h"

#include <algorithm>
#include <bit>
#include <numeric>
#include <set>
#include <utility>

namespace refinery::data {

uint64_t SeededRandom::Next() {
  uint64_t z = state_ += 0x9E3779B97F4A7C15;
  z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
  z = (z ^ z >> 27) * 0x94D049BB133111EB;
  return z ^ z >> 31;
}

uint64_t SeededRandom::Below(uint64_t n) {
  const uint64_t limit = ~uint64_t{0} - ~uint64_t{0} % n;  // a multiple of n: no value is favoured
  uint64_t value = Next();
  while (value >= limit) value = Next();
  return value % n;
}

std::vector<size_t> SeededRandom::Permutation(size_t n) {
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t{0});
  for (size_t i = n; i > 1; --i) std::swap(order[i - 1], order[Below(i)]);
  return order;
}

std::vector<size_t> SeededRandom::Sample(size_t n, size_t k) {
  std::vector<size_t> order = Permutation(n);
  order.resize(std::min(n, k));
  return order;
}

PythonRandom::PythonRandom(uint32_t seed) {
  state_[0] = 19650218;  // init_genrand, then init_by_array({seed})
  for (uint32_t i = 1; i < 624; ++i) state_[i] = 1812433253U * (state_[i - 1] ^ state_[i - 1] >> 30) + i;
  size_t i = 1;
  const auto advance = [&] {
    if (++i == 624) {
      state_[0] = state_[623];
      i = 1;
    }
  };
  for (int k = 0; k < 624; ++k, advance()) {
    state_[i] = (state_[i] ^ (state_[i - 1] ^ state_[i - 1] >> 30) * 1664525U) + seed;
  }
  for (int k = 0; k < 623; ++k, advance()) {
    state_[i] = (state_[i] ^ (state_[i - 1] ^ state_[i - 1] >> 30) * 1566083941U) - static_cast<uint32_t>(i);
  }
  state_[0] = 0x80000000U;
}

uint32_t PythonRandom::Next() {
  if (index_ == 624) {
    for (size_t i = 0; i < 624; ++i) {
      const uint32_t y = (state_[i] & 0x80000000U) | (state_[(i + 1) % 624] & 0x7FFFFFFFU);
      state_[i] = state_[(i + 397) % 624] ^ y >> 1 ^ ((y & 1) != 0 ? 0x9908B0DFU : 0U);
    }
    index_ = 0;
  }
  uint32_t y = state_[index_++];
  y ^= y >> 11;
  y ^= y << 7 & 0x9D2C5680U;
  y ^= y << 15 & 0xEFC60000U;
  return y ^ y >> 18;
}

double PythonRandom::Double() {
  const uint32_t high = Next() >> 5, low = Next() >> 6;
  return (high * 67108864.0 + low) * (1.0 / 9007199254740992.0);
}

size_t PythonRandom::Below(size_t n) {
  const int bits = std::bit_width(n);
  size_t value = Next() >> (32 - bits);
  while (value >= n) value = Next() >> (32 - bits);
  return value;
}

std::vector<size_t> PythonRandom::Sample(size_t n, size_t k) {
  size_t set_size = 21;
  if (k > 5) {
    size_t power = 4;
    while (power < 3 * k) power *= 4;
    set_size += power;
  }
  std::vector<size_t> result;
  if (n <= set_size) {
    std::vector<size_t> pool(n);
    std::iota(pool.begin(), pool.end(), size_t{0});
    for (size_t i = 0; i < k; ++i) {
      const size_t j = Below(n - i);
      result.push_back(pool[j]);
      pool[j] = pool[n - i - 1];
    }
    return result;
  }
  std::set<size_t> selected;
  while (result.size() < k) {
    const size_t j = Below(n);
    if (selected.insert(j).second) result.push_back(j);
  }
  return result;
}

}  // namespace refinery::data
