#include "worker/task/generate/sampler.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>

#include "tests/support/status_matchers.h"

namespace refinery::generate {
namespace {

using nlohmann::json;
using ::refinery::testing::IsOk;
using ::refinery::testing::StatusIs;
using ::testing::HasSubstr;

constexpr int kDraws = 40000;

// Frequencies of kDraws draws from the same logits.
std::map<int32_t, double> Frequencies(const std::vector<float>& logits, const SamplingSettings& settings) {
  std::map<int32_t, double> frequencies;
  for (int i = 0; i < kDraws; ++i) {
    std::vector<float> row = logits;
    frequencies[Sample(row.data(), static_cast<int64_t>(row.size()), settings, TokenCounts(), UniformAt(5, static_cast<uint64_t>(i)))] +=
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
  ExpectSoftmax(Logits(), {.temperature = 2.0, .top_k = 2}, {3, 20, 38});  // those equal to the last one stay
  // Probabilities at temperature 0.25: token 3 has about 0.787, tokens 20 and 38 about 0.106 each.
  ExpectSoftmax(Logits(), {.temperature = 0.25, .top_p = 0.7}, {3});
  ExpectSoftmax(Logits(), {.temperature = 0.25, .top_p = 0.85}, {3, 20});
  ExpectSoftmax(Logits(), {.temperature = 0.25, .top_p = 0.95}, {3, 20, 38});
  // Within the three kept by top-k, token 3 has 0.452, so 0.5 needs two of them.
  ExpectSoftmax(Logits(), {.temperature = 1.0, .top_p = 0.5, .top_k = 3}, {3, 20});
}

TEST(SamplerTest, GreedyTakesTheFirstLargest) {
  std::vector<float> logits = {1, 5, 2, 5};
  EXPECT_EQ(Sample(logits.data(), 4, {.temperature = 0}, TokenCounts(), 0.9), 1);
}

// A number of the vectors, in which "-inf" stands for minus infinity.
float Number(const json& value) { return value.is_string() ? -std::numeric_limits<float>::infinity() : value.get<float>(); }

std::vector<float> Row(const json& values) {
  std::vector<float> row;
  for (const json& value : values) row.push_back(Number(value));
  return row;
}

json Vectors() {
  std::ifstream file(std::string(REFINERY_SOURCE_DIR) + "/tests/vectors/generate/sampling.json");
  return json::parse(file);
}

SamplingSettings SettingsOf(const json& s) {
  return {.temperature = s.value("temperature", 1.0),
          .top_p = s.value("top_p", 1.0),
          .top_k = s.value("top_k", int64_t{0}),
          .repetition_penalty = s.value("repetition_penalty", 1.0),
          .min_p = s.value("min_p", 0.0),
          .presence_penalty = s.value("presence_penalty", 0.0),
          .frequency_penalty = s.value("frequency_penalty", 0.0)};
}

// Goal: every setting, alone and together, leaves the tokens that transformers leaves, with the same probabilities; and draws
// land on those tokens.  Oracle: transformers' logits processors (tests/vectors/generate/make_vectors.py).
TEST(SamplerTest, DistributionsEqualTransformers) {
  const json vectors = Vectors();
  TokenCounts seen;
  for (int32_t token : vectors["prompt"].get<std::vector<int32_t>>()) seen.AddPrompt(token);
  for (int32_t token : vectors["answer"].get<std::vector<int32_t>>()) seen.AddAnswer(token);
  ASSERT_GT(vectors["cases"].size(), 100);
  for (const json& one : vectors["cases"]) {
    SCOPED_TRACE(one["row"].dump() + " " + one["settings"].dump());
    const SamplingSettings settings = SettingsOf(one["settings"]);
    EXPECT_THAT(CheckSampling(settings), IsOk());
    const std::vector<float> logits = Row(vectors["rows"][one["row"].get<std::string>()]);
    std::vector<float> row = logits;
    const auto vocab = static_cast<int64_t>(row.size());
    std::map<std::string, double> ours;
    for (const auto& [token, probability] : Distribution(row.data(), vocab, settings, seen)) ours[std::to_string(token)] = probability;
    const json& theirs = one["distribution"];
    for (const auto& [token, probability] : theirs.items()) {
      if (probability.get<double>() < 1e-30) continue;  // below what exp of float32 keeps
      ASSERT_TRUE(ours.contains(token)) << token;
      EXPECT_NEAR(ours[token], probability.get<double>(), 2e-6 * probability.get<double>() + 1e-9) << token;
    }
    for (const auto& [token, probability] : ours) EXPECT_TRUE(theirs.contains(token)) << token;
    for (int draw = 0; draw < 8; ++draw) {
      row = logits;
      const int32_t token = Sample(row.data(), vocab, settings, seen, draw / 8.0);
      EXPECT_TRUE(theirs.contains(std::to_string(token))) << token;
    }
  }
}

TEST(SamplerTest, LogProbsEqualTorch) {
  const json vectors = Vectors();
  for (const auto& [name, values] : vectors["rows"].items()) {
    const std::vector<float> row = Row(values), expected = Row(vectors["log_probs"][name]);
    for (int32_t token : {0, 17, 39}) {
      TokenLogProb out{.token = token};
      FillLogProbs(row.data(), static_cast<int64_t>(row.size()), 5, &out);
      const float wanted = expected[static_cast<size_t>(token)];
      if (std::isinf(wanted)) EXPECT_EQ(out.log_prob, wanted);
      else EXPECT_NEAR(out.log_prob, wanted, 2e-6 * (1 + std::abs(wanted))) << name << " " << token;
      ASSERT_EQ(out.top.size(), 5);
      std::vector<float> sorted = expected;
      std::ranges::sort(sorted, std::greater());
      for (size_t i = 0; i < 5 && std::isfinite(sorted[i]); ++i) {
        EXPECT_NEAR(out.top[i].second, sorted[i], 2e-6 * (1 + std::abs(sorted[i])));
        EXPECT_NEAR(out.top[i].second, expected[static_cast<size_t>(out.top[i].first)], 2e-6 * (1 + std::abs(sorted[i])));
      }
    }
    TokenLogProb all{.token = 0};
    FillLogProbs(row.data(), static_cast<int64_t>(row.size()), 1000, &all);
    EXPECT_EQ(all.top.size(), row.size());
    FillLogProbs(row.data(), static_cast<int64_t>(row.size()), 0, &all);
    EXPECT_TRUE(all.top.empty());
  }
}

TEST(SamplerTest, TinyTemperaturesAreGreedy) {
  for (double temperature : {1e-3, 1e-5, 1e-9, 1e-300, 0.0}) {
    std::vector<float> logits = {1, 2, 5, 4.9f, -100};
    EXPECT_EQ(Sample(logits.data(), 5, {.temperature = temperature}, TokenCounts(), 0.999999), 2) << temperature;
  }
}

// Each of 50 tokens in turn is the only possible one, under every way of choosing.
TEST(SamplerTest, OneTokenWithoutMinusInfinityIsChosen) {
  for (const SamplingSettings& settings : std::vector<SamplingSettings>{
           {.temperature = 0}, {.temperature = 1}, {.top_p = 0}, {.top_p = 0.5}, {.top_k = 7}, {.top_k = 1}, {.min_p = 1}}) {
    for (size_t token = 0; token < 50; ++token) {
      std::vector<float> logits(50, -std::numeric_limits<float>::infinity());
      logits[token] = -80;
      EXPECT_EQ(Sample(logits.data(), 50, settings, TokenCounts(), 0.7), token);
    }
  }
}

TEST(SamplerTest, LogitsThatAreNotFiniteAreTold) {
  for (const SamplingSettings& settings : std::vector<SamplingSettings>{{.temperature = 0}, {.temperature = 1}, {.top_p = 0.5}}) {
    for (size_t place = 0; place < 37; ++place) {
      std::vector<float> nan(37, 0.0f), infinite(37, 0.0f);
      nan[place] = std::nanf("");
      infinite[place] = std::numeric_limits<float>::infinity();
      EXPECT_EQ(Sample(nan.data(), 37, settings, TokenCounts(), 0.5), -1) << place;
      EXPECT_EQ(Sample(infinite.data(), 37, settings, TokenCounts(), 0.5), -1) << place;
    }
    std::vector<float> none(37, -std::numeric_limits<float>::infinity());
    EXPECT_EQ(Sample(none.data(), 37, settings, TokenCounts(), 0.5), -1);
  }
}

TEST(SamplerTest, WrongSettingsAreNamed) {
  const double nan = std::nan(""), infinity = std::numeric_limits<double>::infinity();
  const auto refused = [](const SamplingSettings& settings, const char* field) {
    EXPECT_THAT(CheckSampling(settings), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(field))) << field;
  };
  for (double wrong : {-0.1, nan, infinity}) refused({.temperature = wrong}, "temperature is");
  for (double wrong : {-0.1, 1.1, nan}) refused({.top_p = wrong}, "top_p is");
  for (double wrong : {-0.1, 1.1, nan}) refused({.min_p = wrong}, "min_p is");
  for (double wrong : {0.0, -1.0, nan, infinity}) refused({.repetition_penalty = wrong}, "repetition_penalty is");
  for (double wrong : {-2.1, 2.1, nan}) refused({.presence_penalty = wrong}, "presence_penalty is");
  for (double wrong : {-2.1, 2.1, nan}) refused({.frequency_penalty = wrong}, "frequency_penalty is");
  refused({.top_k = -1}, "top_k is -1");
  EXPECT_THAT(CheckSampling({.temperature = 0, .top_p = 0, .min_p = 1, .presence_penalty = -2, .frequency_penalty = 2}), IsOk());
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
