#include "worker/task/generate/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "worker/task/generate/cpu_kernels.h"

namespace refinery::generate {
namespace {

struct Candidate {
  float weight;  // exp(logit - highest)
  int32_t token;
};

// Larger first, the smaller token where equal, so that the order is total.
bool Before(const Candidate& a, const Candidate& b) {
  return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
}

void Penalize(float* logits, int64_t vocab, double penalty, std::vector<int32_t> seen) {
  std::ranges::sort(seen);
  seen.erase(std::unique(seen.begin(), seen.end()), seen.end());
  for (int32_t token : seen) {
    if (token < 0 || token >= vocab) continue;
    float& logit = logits[token];
    logit = logit < 0 ? logit * static_cast<float>(penalty) : logit / static_cast<float>(penalty);
  }
}

// The token at which the running sum of weights passes uniform * total.
template <typename Weight, typename Token>
int32_t Draw(size_t count, double total, double uniform, const Weight& weight, const Token& token) {
  double rest = uniform * total;
  size_t last = 0;
  for (size_t i = 0; i < count; ++i) {
    if (weight(i) <= 0) continue;
    last = i;
    rest -= weight(i);
    if (rest < 0) break;
  }
  return token(last);
}

// The smallest set of largest candidates whose weight reaches `wanted` (at most `limit`), sorted. Sorts only as far as needed.
std::vector<Candidate> Nucleus(const float* weights, int64_t vocab, double wanted, size_t limit) {
  std::vector<Candidate> all(static_cast<size_t>(vocab));
  for (int64_t t = 0; t < vocab; ++t) all[static_cast<size_t>(t)] = {weights[t], static_cast<int32_t>(t)};
  limit = std::min(limit, all.size());
  double sum = 0;
  size_t kept = 0;
  for (size_t sorted = 0; sorted < limit;) {
    const size_t next = std::min(limit, std::max<size_t>(64, sorted * 4));
    const auto begin = all.begin() + static_cast<std::ptrdiff_t>(sorted), end = all.begin() + static_cast<std::ptrdiff_t>(next);
    std::partial_sort(begin, end, all.end(), Before);
    for (; kept < next && (kept == 0 || sum < wanted); ++kept) sum += all[kept].weight;
    if (kept < next || (sum >= wanted && kept > 0)) break;
    sorted = next;
  }
  all.resize(kept);
  return all;
}

}  // namespace

double UniformAt(uint64_t seed, uint64_t index) {
  uint64_t z = seed * 0x9E3779B97F4A7C15u + (index + 1) * 0xD1B54A32D192ED03u;
  for (int round = 0; round < 2; ++round) {
    z += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    z ^= z >> 31;
  }
  return static_cast<double>(z >> 11) * 0x1p-53;
}

int32_t Sample(float* logits, int64_t vocab, const SamplingSettings& settings, const std::vector<int32_t>& seen, double uniform) {
  if (settings.repetition_penalty != 1.0) Penalize(logits, vocab, settings.repetition_penalty, seen);
  const int64_t best = std::max_element(logits, logits + vocab) - logits;
  if (!std::isfinite(logits[best])) return -1;
  if (settings.temperature <= 0 || settings.top_k == 1) return static_cast<int32_t>(best);
  const double total = kernels::ExpInPlace(logits, vocab, logits[best], static_cast<float>(1 / settings.temperature));
  if (!std::isfinite(total)) return -1;
  const auto count = static_cast<size_t>(vocab);
  if (settings.top_k <= 0 && settings.top_p >= 1) {
    return Draw(count, total, uniform, [&](size_t i) { return logits[i]; }, [](size_t i) { return static_cast<int32_t>(i); });
  }
  std::vector<Candidate> kept;
  if (settings.top_k > 0) {
    // Top-p then counts within the k kept.
    kept = Nucleus(logits, vocab, std::numeric_limits<double>::infinity(), static_cast<size_t>(settings.top_k));
    double within = 0, sum = 0;
    for (const Candidate& c : kept) within += c.weight;
    size_t size = 0;
    while (size < kept.size() && (size == 0 || sum < settings.top_p * within)) sum += kept[size++].weight;
    if (settings.top_p < 1) kept.resize(size);
  } else {
    kept = Nucleus(logits, vocab, settings.top_p * total, count);
  }
  double sum = 0;
  for (const Candidate& c : kept) sum += c.weight;
  return Draw(kept.size(), sum, uniform, [&](size_t i) { return kept[i].weight; }, [&](size_t i) { return kept[i].token; });
}

}  // namespace refinery::generate
