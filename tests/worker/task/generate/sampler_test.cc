#include "worker/task/generate/sampler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <map>

namespace refinery::generate {
namespace {

constexpr int kDraws = 40000;

// Frequencies of kDraws draws from the same logits.
std::map<int32_t, double> Frequencies(const std::vector<float>& logits, const SamplingSettings& settings) {
  std::map<int32_t, double> frequencies;
  for (int i = 0; i < kDraws; ++i) {
    std::vector<float> row = logits;
    frequencies[Sample(row.data(), static_cast<int64_t>(row.size()), settings, {}, UniformAt(5, static_cast<uint64_t>(i)))] +=
        1.0 / kDraws;
  }
  return frequencies;
}

// Goal: tokens come with their probability.  Oracle: softmax of the logits of the allowed tokens; five standard errors.
void ExpectSoftmax(const std::vector<float>& logits, const SamplingSettings& settings, const std::vector<int32_t>& allowed) {
  const std::map<int32_t, double> frequencies = Frequencies(logits, settings);
  double total = 0;
  for (int32_t t : allowed) total += std::exp(logits[static_cast<size_t>(t)] / settings.temperature);
  for (const auto& [token, frequency] : frequencies) EXPECT_THAT(allowed, ::testing::Contains(token));
  for (int32_t t : allowed) {
    const double p = std::exp(logits[static_cast<size_t>(t)] / settings.temperature) / total;
    const auto found = frequencies.find(t);
    EXPECT_NEAR(found == frequencies.end() ? 0 : found->second, p, 5 * std::sqrt(p * (1 - p) / kDraws) + 1e-9) << t;
  }
}

// 40 logits, two of them equal; the largest are tokens 3, 20 and 38.
std::vector<float> Logits() {
  std::vector<float> logits(40);
  for (int i = 0; i < 40; ++i) logits[static_cast<size_t>(i)] = std::sin(static_cast<float>(i)) - 0.01f * static_cast<float>(i);
  logits[3] = 3.0f;
  logits[20] = 2.5f;
  logits[38] = 2.5f;
  return logits;
}

TEST(SamplerTest, DrawsFollowTheSoftmax) {
  std::vector<int32_t> all(40);
  for (int i = 0; i < 40; ++i) all[static_cast<size_t>(i)] = i;
  ExpectSoftmax(Logits(), {.temperature = 1.0}, all);
  ExpectSoftmax(Logits(), {.temperature = 0.5}, all);
}

TEST(SamplerTest, TopKAndTopPKeepTheLargest) {
  ExpectSoftmax(Logits(), {.temperature = 1.0, .top_k = 3}, {3, 20, 38});
  ExpectSoftmax(Logits(), {.temperature = 2.0, .top_k = 2}, {3, 20});  // of two equal ones the first
  // Probabilities at temperature 0.25: token 3 has about 0.787, tokens 20 and 38 about 0.106 each.
  ExpectSoftmax(Logits(), {.temperature = 0.25, .top_p = 0.7}, {3});
  ExpectSoftmax(Logits(), {.temperature = 0.25, .top_p = 0.85}, {3, 20});
  ExpectSoftmax(Logits(), {.temperature = 0.25, .top_p = 0.95}, {3, 20, 38});
  // Within the three kept by top-k, token 3 has 0.452, so 0.5 needs two of them.
  ExpectSoftmax(Logits(), {.temperature = 1.0, .top_p = 0.5, .top_k = 3}, {3, 20});
}

TEST(SamplerTest, GreedyTakesTheFirstLargest) {
  std::vector<float> logits = {1, 5, 2, 5};
  EXPECT_EQ(Sample(logits.data(), 4, {.temperature = 0}, {}, 0.9), 1);
}

// transformers' RepetitionPenaltyLogitsProcessor: positive logits are divided, negative ones multiplied, once per token.
TEST(SamplerTest, RepetitionPenaltyAsInTransformers) {
  std::vector<float> logits = {1, 5, 4, -1};
  EXPECT_EQ(Sample(logits.data(), 4, {.temperature = 0, .repetition_penalty = 1.3}, {1, 1, 3}, 0), 2);
  EXPECT_FLOAT_EQ(logits[1], 5 / 1.3f);
  EXPECT_FLOAT_EQ(logits[3], -1.3f);
}

TEST(SamplerTest, LogitsThatAreNotFiniteAreTold) {
  std::vector<float> nan(20, std::nanf("")), infinite(20, 0.0f);
  infinite[3] = std::numeric_limits<float>::infinity();
  EXPECT_EQ(Sample(nan.data(), 20, {.temperature = 0}, {}, 0.5), -1);
  EXPECT_EQ(Sample(infinite.data(), 20, {.temperature = 1}, {}, 0.5), -1);
  std::vector<float> one(20, 0.0f);
  one[17] = std::nanf("");
  EXPECT_EQ(Sample(one.data(), 20, {.temperature = 1}, {}, 0.5), -1);
}

// Goal: streams of nearby seeds are uniform and unrelated.  Method: mean, variance and correlation of 40000 numbers.
TEST(SamplerTest, StreamsAreUniformAndUnrelated) {
  double sum = 0, squares = 0, product = 0;
  for (uint64_t i = 0; i < kDraws; ++i) {
    const double u = UniformAt(7, i), v = UniformAt(8, i);
    ASSERT_TRUE(u >= 0 && u < 1);
    sum += u;
    squares += u * u;
    product += (u - 0.5) * (v - 0.5);
  }
  EXPECT_NEAR(sum / kDraws, 0.5, 5 * std::sqrt(1.0 / 12 / kDraws));
  EXPECT_NEAR(squares / kDraws, 1.0 / 3, 0.01);
  EXPECT_NEAR(product / kDraws, 0, 5.0 / 12 / std::sqrt(kDraws));
}

}  // namespace
}  // namespace refinery::generate
