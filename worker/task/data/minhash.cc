#include "worker/task/data/minhash.h"

#include <algorithm>
#include <cmath>

#include "worker/task/data/random.h"
#include "worker/task/data/text.h"

namespace refinery::data {
namespace {

constexpr size_t kShingle = 5;
constexpr uint64_t kPrime = (uint64_t{1} << 61) - 1;

uint64_t Fnv1a(std::string_view bytes) {
  uint64_t hash = 0xCBF29CE484222325;
  for (const char c : bytes) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001B3;
  return hash;
}

struct Permutation {
  uint64_t a, b;
};

const std::array<Permutation, kMinHashPermutations>& Permutations() {
  static const auto permutations = [] {
    std::array<Permutation, kMinHashPermutations> made{};
    SeededRandom random(1);
    for (Permutation& p : made) p = {1 + random.Below(kPrime - 1), random.Below(kPrime)};
    return made;
  }();
  return permutations;
}

// Largest rows per band for which a pair exactly at the threshold is still found with 99.9 %.
size_t RowsFor(double threshold) {
  for (size_t rows = 16; rows > 1; rows /= 2) {
    const double bands = static_cast<double>(kMinHashPermutations / rows);
    if (std::pow(1 - std::pow(threshold, static_cast<double>(rows)), bands) < 1e-3) return rows;
  }
  return 1;
}

}  // namespace

MinHashSignature MinHash(std::string_view text) {
  MinHashSignature signature;
  signature.fill(UINT32_MAX);
  const std::string normalized = Normalized(text);
  const size_t count = normalized.size() < kShingle ? 1 : normalized.size() - kShingle + 1;
  for (size_t i = 0; i < count; ++i) {
    const uint64_t x = Fnv1a(std::string_view(normalized).substr(i, kShingle)) % kPrime;
    for (size_t p = 0; p < kMinHashPermutations; ++p) {
      const Permutation& permutation = Permutations()[p];
      const auto product = static_cast<unsigned __int128>(permutation.a) * x + permutation.b;
      const auto value = static_cast<uint32_t>(static_cast<uint64_t>(product % kPrime) >> 29);
      signature[p] = std::min(signature[p], value);
    }
  }
  return signature;
}

double Similarity(const MinHashSignature& a, const MinHashSignature& b) {
  size_t equal = 0;
  for (size_t i = 0; i < kMinHashPermutations; ++i) equal += a[i] == b[i] ? 1 : 0;
  return static_cast<double>(equal) / static_cast<double>(kMinHashPermutations);
}

MinHashIndex::MinHashIndex(double threshold) : threshold_(threshold), rows_(RowsFor(threshold)) {}

uint64_t MinHashIndex::BandKey(const MinHashSignature& signature, size_t band) const {
  uint64_t key = 0x9E3779B97F4A7C15 * (band + 1);
  for (size_t row = 0; row < rows_; ++row) key = (key ^ signature[band * rows_ + row]) * 0x100000001B3;
  return key;
}

std::optional<std::pair<size_t, double>> MinHashIndex::FindDuplicate(const MinHashSignature& signature) const {
  std::optional<std::pair<size_t, double>> best;
  for (size_t band = 0; band < kMinHashPermutations / rows_; ++band) {
    const auto [begin, end] = bands_.equal_range(BandKey(signature, band));
    for (auto it = begin; it != end; ++it) {
      const auto& [id, other] = entries_[it->second];
      const double similarity = Similarity(signature, other);
      if (similarity < threshold_) continue;
      // Ties go to the earlier text, whatever order the table yields.
      if (!best || similarity > best->second || (similarity == best->second && id < best->first)) best = {id, similarity};
    }
  }
  return best;
}

void MinHashIndex::Add(size_t id, const MinHashSignature& signature) {
  for (size_t band = 0; band < kMinHashPermutations / rows_; ++band) {
    bands_.emplace(BandKey(signature, band), entries_.size());
  }
  entries_.emplace_back(id, signature);
}

}  // namespace refinery::data
