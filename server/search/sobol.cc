#include "server/search/sobol.h"

namespace refinery::search {
namespace {

uint32_t ReverseBits(uint32_t x) {
  x = (x >> 16) | (x << 16);
  x = ((x & 0xff00ff00u) >> 8) | ((x & 0x00ff00ffu) << 8);
  x = ((x & 0xf0f0f0f0u) >> 4) | ((x & 0x0f0f0f0fu) << 4);
  x = ((x & 0xccccccccu) >> 2) | ((x & 0x33333333u) << 2);
  return ((x & 0xaaaaaaaau) >> 1) | ((x & 0x55555555u) << 1);
}

// Every bit of the result depends on the same and lower bits of x only.
uint32_t LaineKarras(uint32_t x, uint32_t seed) {
  x += seed;
  x ^= x * 0x6c50b47cu;
  x ^= x * 0xb82f1e52u;
  x ^= x * 0xc7afe638u;
  x ^= x * 0x8d22f6e6u;
  return x;
}

// SplitMix64.
uint64_t Mix(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

ScrambledSobol::ScrambledSobol(uint32_t dimensions, uint64_t seed) : engine_(dimensions) {
  for (uint32_t d = 0; d < dimensions; ++d) seeds_.push_back(static_cast<uint32_t>(Mix(seed + d) >> 32));
}

std::vector<double> ScrambledSobol::Next() {
  std::vector<double> point;
  for (uint32_t seed : seeds_) {
    const uint32_t digits = first_ ? 0 : static_cast<uint32_t>(static_cast<uint64_t>(engine_()) >> 32);
    const uint32_t scrambled = ReverseBits(LaineKarras(ReverseBits(digits), seed));
    point.push_back(scrambled * 0x1p-32);
  }
  first_ = false;
  return point;
}

}  // namespace refinery::search
