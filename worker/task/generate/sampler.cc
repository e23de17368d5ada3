#include "worker/task/generate/sampler.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "worker/task/generate/cpu_kernels.h"

namespace refinery::generate {
namespace {

struct Candidate {
  float weight;  // exp(logit - highest), or a logit
  int32_t token;
};

// Larger first, the smaller token where equal, so that the order is total.
bool Before(const Candidate& a, const Candidate& b) {
  return a.weight != b.weight ? a.weight > b.weight : a.token < b.token;
}

constexpr double kGreedyBelow = 1e-5;  // temperature; exp(x / temperature) would leave float32's range

bool IsGreedy(const SamplingSettings& settings) { return settings.temperature < kGreedyBelow || settings.top_k == 1; }

void Penalize(float* logits, int64_t vocab, const SamplingSettings& settings, const TokenCounts& seen) {
  const auto repetition = static_cast<float>(settings.repetition_penalty);
  for (const TokenCounts::Count& count : seen.counts()) {
    if (count.token < 0 || count.token >= vocab) continue;
    float& logit = logits[count.token];
    logit = logit < 0 ? logit * repetition : logit / repetition;
    if (count.in_answer == 0) continue;
    logit -= static_cast<float>(settings.frequency_penalty) * static_cast<float>(count.in_answer);
    logit -= static_cast<float>(settings.presence_penalty);
  }
}

// The index of the largest, or -1 when the row is not usable.
int64_t Largest(const float* logits, int64_t vocab) {
  constexpr int64_t kLanes = 16;  // side by side, for the vector units
  std::array<float, kLanes> highest;
  std::array<int32_t, kLanes> nan{};
  highest.fill(-std::numeric_limits<float>::infinity());
  for (int64_t t = 0; t < vocab; ++t) {
    if (t + kLanes <= vocab && t % kLanes == 0) {
      for (int64_t i = 0; i < kLanes; ++i) {
        const float x = logits[t + i];
        highest[static_cast<size_t>(i)] = x > highest[static_cast<size_t>(i)] ? x : highest[static_cast<size_t>(i)];
        nan[static_cast<size_t>(i)] |= x != x;
      }
      t += kLanes - 1;
    } else {
      highest[0] = std::max(highest[0], logits[t]);
      nan[0] |= logits[t] != logits[t];
    }
  }
  const float best = *std::ranges::max_element(highest);
  if (std::ranges::count(nan, 0) != kLanes || !std::isfinite(best)) return -1;
  return std::find(logits, logits + vocab, best) - logits;
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

// The largest candidates, sorted: the first `limit`, or as many as it takes for their weight to reach `wanted`. Sorts only as far
// as needed.
void KeepNucleus(std::vector<Candidate>* all, double wanted, size_t limit) {
  limit = std::min(limit, all->size());
  double sum = 0;
  size_t kept = 0;
  for (size_t sorted = 0; sorted < limit;) {
    const size_t next = std::min(limit, std::max<size_t>(64, sorted * 4));
    const auto begin = all->begin() + static_cast<std::ptrdiff_t>(sorted), end = all->begin() + static_cast<std::ptrdiff_t>(next);
    std::partial_sort(begin, end, all->end(), Before);
    for (; kept < next && (kept == 0 || sum < wanted); ++kept) sum += (*all)[kept].weight;
    if (kept < next || (sum >= wanted && kept > 0)) break;
    sorted = next;
  }
  all->resize(kept);
}

// The k largest and those equal to the last of them, sorted.
void KeepTopK(std::vector<Candidate>* all, size_t k) {
  k = std::min(k, all->size());
  if (k == 0) return;
  const auto middle = all->begin() + static_cast<std::ptrdiff_t>(k);
  std::partial_sort(all->begin(), middle, all->end(), Before);
  const float least = (*all)[k - 1].weight;
  all->erase(std::remove_if(middle, all->end(), [&](const Candidate& c) { return c.weight < least; }), all->end());
  std::sort(all->begin() + static_cast<std::ptrdiff_t>(k), all->end(), Before);
}

// What top-k, top-p and min-p leave of the weights (exp(logit - highest), so that the largest is 1), sorted.
std::vector<Candidate> Keep(const float* weights, int64_t vocab, int64_t best, double total, const SamplingSettings& settings) {
  const auto min_weight = static_cast<float>(settings.min_p) * weights[best];
  std::vector<Candidate> kept;
  // Min-p cuts after top-p, but whom it cuts does not depend on that, so they need not be sorted. Top-k and top-p count them.
  const float least = settings.top_k > 0 ? 0 : min_weight;
  for (int64_t t = 0; t < vocab; ++t) {
    if (weights[t] > 0 && weights[t] >= least) kept.push_back({weights[t], static_cast<int32_t>(t)});
  }
  if (settings.top_k > 0) {
    KeepTopK(&kept, static_cast<size_t>(settings.top_k));
    total = 0;  // top-p counts within those kept
    for (const Candidate& c : kept) total += c.weight;
  }
  const double wanted = settings.top_p < 1 ? settings.top_p * total : std::numeric_limits<double>::infinity();
  KeepNucleus(&kept, wanted, kept.size());
  const auto small = [&](const Candidate& c) { return c.weight < min_weight; };
  kept.erase(std::ranges::find_if(kept, small), kept.end());
  return kept;
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

TokenCounts::Count& TokenCounts::Find(int32_t token) {
  const auto [found, added] = index_.try_emplace(token, counts_.size());
  if (added) counts_.push_back({token, 0});
  return counts_[found->second];
}

bool HasPenalties(const SamplingSettings& settings) {
  return settings.repetition_penalty != 1 || settings.presence_penalty != 0 || settings.frequency_penalty != 0;
}

int32_t Sample(float* logits, int64_t vocab, const SamplingSettings& settings, const TokenCounts& seen, double uniform) {
  if (HasPenalties(settings)) Penalize(logits, vocab, settings, seen);
  const int64_t best = Largest(logits, vocab);
  if (best < 0 || IsGreedy(settings)) return static_cast<int32_t>(best);
  const double total = kernels::ExpInPlace(logits, vocab, logits[best], static_cast<float>(1 / settings.temperature));
  if (settings.top_k <= 0 && settings.top_p >= 1 && settings.min_p <= 0) {
    return Draw(static_cast<size_t>(vocab), total, uniform, [&](size_t i) { return logits[i]; },
                [](size_t i) { return static_cast<int32_t>(i); });
  }
  const std::vector<Candidate> kept = Keep(logits, vocab, best, total, settings);
  double sum = 0;
  for (const Candidate& c : kept) sum += c.weight;
  return Draw(kept.size(), sum, uniform, [&](size_t i) { return kept[i].weight; }, [&](size_t i) { return kept[i].token; });
}

std::vector<std::pair<int32_t, double>> Distribution(float* logits, int64_t vocab, const SamplingSettings& settings,
                                                     const TokenCounts& seen) {
  if (HasPenalties(settings)) Penalize(logits, vocab, settings, seen);
  const int64_t best = Largest(logits, vocab);
  if (best < 0) return {};
  if (IsGreedy(settings)) return {{static_cast<int32_t>(best), 1.0}};
  const double total = kernels::ExpInPlace(logits, vocab, logits[best], static_cast<float>(1 / settings.temperature));
  const std::vector<Candidate> kept = Keep(logits, vocab, best, total, settings);
  double sum = 0;
  for (const Candidate& c : kept) sum += c.weight;
  std::vector<std::pair<int32_t, double>> distribution;
  for (const Candidate& c : kept) distribution.emplace_back(c.token, c.weight / sum);
  return distribution;
}

void FillLogProbs(const float* logits, int64_t vocab, int64_t top, TokenLogProb* out) {
  const float highest = *std::max_element(logits, logits + vocab);
  std::vector<float> weights(logits, logits + vocab);
  const auto norm = static_cast<float>(std::log(kernels::ExpInPlace(weights.data(), vocab, highest, 1)));
  out->log_prob = logits[out->token] - highest - norm;
  std::vector<Candidate> all(static_cast<size_t>(top > 0 ? vocab : 0));
  for (size_t t = 0; t < all.size(); ++t) all[t] = {logits[t], static_cast<int32_t>(t)};
  const size_t count = std::min(static_cast<size_t>(std::max<int64_t>(0, top)), all.size());
  std::partial_sort(all.begin(), all.begin() + static_cast<std::ptrdiff_t>(count), all.end(), Before);
  out->top.clear();
  for (size_t i = 0; i < count; ++i) out->top.emplace_back(all[i].token, all[i].weight - highest - norm);
}

}  // namespace refinery::generate
