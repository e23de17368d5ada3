// worker/task/data/minhash.h
//
// Near-duplicates by MinHash: the share of equal signature entries estimates the Jaccard similarity of two texts' character
// 5-grams, and banding finds candidates without comparing all pairs.
//
// Source: Broder 1997; 128 permutations as in distilabel and NeMo Curator.  Standard error of the estimate: at most 0.045.
// Deterministic: fixed permutations, no platform hash.  Threads: one object, one thread.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

namespace refinery::data {

inline constexpr size_t kMinHashPermutations = 128;
using MinHashSignature = std::array<uint32_t, kMinHashPermutations>;

// Of the normalised text (case, punctuation and spacing do not matter).
MinHashSignature MinHash(std::string_view text);
// Estimated Jaccard similarity.
double Similarity(const MinHashSignature& a, const MinHashSignature& b);

class MinHashIndex {
 public:
  // Similarity in (0, 1] from which two texts are duplicates.
  explicit MinHashIndex(double threshold);
  // The id of the most similar text added so far and the estimate, if that reaches the threshold.
  std::optional<std::pair<size_t, double>> FindDuplicate(const MinHashSignature& signature) const;
  void Add(size_t id, const MinHashSignature& signature);

 private:
  uint64_t BandKey(const MinHashSignature& signature, size_t band) const;

  double threshold_;
  size_t rows_;  // per band
  std::vector<std::pair<size_t, MinHashSignature>> entries_;
  std::unordered_multimap<uint64_t, size_t> bands_;  // band key -> index into entries_
};

}  // namespace refinery::data
