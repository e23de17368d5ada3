#include "worker/task/runtime/torch.h"

#include "worker/task/distill/tail_grid.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <string>
#include <vector>

#include "tests/support/status_matchers.h"
#include "tests/support/vectors.h"
#include "worker/task/distill/kd_loss.h"

namespace refinery::distill {
namespace {

using ::refinery::testing::IsOk;
using ::refinery::testing::MaxDifference;

constexpr int64_t kVocabulary = 5000;
constexpr int64_t kTopK = 32;
constexpr double kTemperatures[] = {0.7, 1, 1.3, 1.7, 2, 2.6, 3, 5};

// Gaussian logits of every width with the first token level with the rest, ahead of it, and nearly certain; rows of
// heavy tails (Student's t); one token over a flat crowd, where the whole partition turns most sharply.
at::Tensor TeacherLogits() {
  at::Generator generator = at::detail::createCPUGenerator(11);
  std::vector<at::Tensor> rows;
  for (const double width : {0.5, 2.0, 3.0, 5.0}) {
    for (const double lead : {0.0, 8.0, 12.0, 18.0, 25.0, 35.0}) {
      at::Tensor row = width * at::randn({kVocabulary}, generator);
      row[7] += lead;
      row[11] += lead / 2;
      rows.push_back(row);
    }
  }
  for (int i = 0; i < 4; ++i) {
    const at::Tensor spread = at::randn({4, kVocabulary}, generator).square().mean(0).sqrt();
    rows.push_back(2 * at::randn({kVocabulary}, generator) / spread);
  }
  for (const double lead : {10.0, 20.0, 30.0}) {
    at::Tensor row = at::zeros({kVocabulary});
    row[3] = lead;
    rows.push_back(row);
  }
  return at::stack(rows);
}

// What a cache of these logits hands out.
TeacherRows ThroughTheCache(const at::Tensor& logits) {
  const std::filesystem::path folder = std::filesystem::path(::testing::TempDir()) /
                                       ::testing::UnitTest::GetInstance()->current_test_info()->name();
  std::filesystem::remove_all(folder);
  LogitCacheWriter writer({.teacher_digest = "t", .tokenizer_digest = "k", .vocab_size = kVocabulary, .top_k = kTopK});
  writer.Add("row", logits);
  EXPECT_THAT(writer.Write(folder), IsOk());
  const auto cache = LogitCache::Open(folder);
  EXPECT_THAT(cache, IsOk());
  const auto rows = (*cache)->Get("row");
  EXPECT_THAT(rows, IsOk());
  TeacherRows result = *rows;
  std::filesystem::remove_all(folder);
  return result;
}

// Goal: the tail, and with it the whole partition, is that of the full logits at any temperature. Method: logsumexp in
// float64 over the dense logits; at the grid's temperatures 1 and 2 only float32's rounding is left.
TEST(TailGridTest, MatchesTheDensePartition) {
  const at::Tensor logits = TeacherLogits();
  const TeacherRows rows = ThroughTheCache(logits);
  const at::Tensor log_p = logits.to(at::kDouble).log_softmax(1);
  const at::Tensor outside = log_p.scatter(1, rows.ids.to(at::kLong), -INFINITY);
  double worst_whole = 0, worst_tail = 0;
  for (const double temperature : kTemperatures) {
    const at::Tensor tail = TailAtTemperature(rows.tail_logits, rows.tail_log_partitions, temperature);
    const at::Tensor entries = (rows.logits.to(at::kDouble) / temperature).logsumexp({1});
    const double whole = MaxDifference(at::logaddexp(entries, tail), (log_p / temperature).logsumexp({1}));
    const double part = MaxDifference(tail, (outside / temperature).logsumexp({1}));
    EXPECT_LT(whole, temperature == 1 || temperature == 2 ? 1e-5 : 2e-4) << temperature;
    EXPECT_LT(part, temperature == 1 || temperature == 2 ? 1e-5 : 1e-3) << temperature;
    worst_whole = std::max(worst_whole, whole);
    worst_tail = std::max(worst_tail, part);
  }
  RecordProperty("worst_log_partition", std::to_string(worst_whole));
  RecordProperty("worst_log_tail", std::to_string(worst_tail));
}

// Goal: the loss and its gradient are those of the full teacher at any temperature. Method: dense float64 under
// autograd, the tokens outside the entries summed into one bucket on both sides.
TEST(TailGridTest, GivesTheLossOfTheFullTeacher) {
  const at::Tensor logits = TeacherLogits();
  const TeacherRows rows = ThroughTheCache(logits);
  const at::Tensor ids = rows.ids.to(at::kLong);
  at::Generator generator = at::detail::createCPUGenerator(12);
  const int64_t n = logits.size(0);
  const at::Tensor hidden = at::randn({n, 16}, generator);
  const at::Tensor head = at::randn({kVocabulary, 16}, generator) / 2;
  const at::Tensor targets = ids.select(1, 0).contiguous();
  const auto buckets = [&](const at::Tensor& log_p) {
    return at::cat({log_p.gather(1, ids), log_p.scatter(1, ids, -INFINITY).logsumexp({1}, true)}, 1);
  };
  for (const double temperature : kTemperatures) {
    const at::Tensor exact = hidden.to(at::kDouble).requires_grad_(true);
    const at::Tensor log_p = buckets((logits.to(at::kDouble) / temperature).log_softmax(1));
    const at::Tensor log_q = buckets((exact.matmul(head.to(at::kDouble).t()) / temperature).log_softmax(1));
    const at::Tensor kl = (log_p.exp() * (log_p - log_q)).sum(1).mean();
    (temperature * temperature * kl).backward();
    for (const at::ScalarType type : {at::kFloat, at::kDouble}) {  // the fused kernel and the ATen path
      const at::Tensor states = hidden.detach().to(type).requires_grad_(true);
      const KdResult result = KdLoss(states, head.to(type), targets, rows, {.temperature = temperature});
      EXPECT_NEAR(result.kl, kl.item<double>(), 1e-4) << temperature;
      result.loss.backward();
      EXPECT_LT(MaxDifference(states.grad(), exact.grad()), 1e-3 * exact.grad().abs().max().item<double>())
          << temperature;
    }
  }
}

// Goal: a tail of any size keeps its own precision. Method: closed form; a flat tail of mass e^-60 at T = 1.
TEST(TailGridTest, KeepsATailThatTheWholeWouldSwallow) {
  const at::Tensor tail = at::full({1, 100}, -60 - std::log(100.0), at::kFloat);
  const at::Tensor grid = TailLogPartitions(tail);
  for (const double temperature : {0.5, 0.6, 1.0, 1.5, 6.0}) {
    const double wanted = std::log(100.0) + (-60 - std::log(100.0)) / temperature;
    EXPECT_NEAR(TailAtTemperature(grid.select(1, kPlainPoint), grid, temperature).item<double>(), wanted, 1e-4)
        << temperature;
  }
}

TEST(TailGridTest, IsExactAtTheGridPoints) {
  for (size_t i = 0; i < kInverseTemperatures.size(); ++i) {
    const std::vector<double> weights = TailWeights(1 / kInverseTemperatures[i]);
    for (size_t j = 0; j < weights.size(); ++j) EXPECT_EQ(weights[j], i == j ? 1 : 0);
  }
}

// Goal: the weights interpolate. Method: they sum to 1 and give back a polynomial in log b of the highest degree.
TEST(TailGridTest, WeightsReproduceAPolynomial) {
  const auto polynomial = [](double inverse) {
    return std::pow((std::log2(inverse) + 1.3) / 2, 12) - std::log2(inverse);
  };
  for (const double temperature : {0.51, 0.7, 1.01, 1.3, 2.6, 5.0, 7.9}) {
    const std::vector<double> weights = TailWeights(temperature);
    double sum = 0, value = 0;
    for (size_t i = 0; i < weights.size(); ++i) {
      sum += weights[i];
      value += weights[i] * polynomial(kInverseTemperatures[i]);
    }
    EXPECT_NEAR(sum, 1, 1e-12);
    EXPECT_NEAR(value, polynomial(1 / temperature), 1e-10);
  }
}

TEST(TailGridTest, RefusesATemperatureOutsideTheGrid) {
  for (const double temperature : {0.4999, 8.001, 0.0, -1.0, std::nan("")}) {
    EXPECT_THROW(TailWeights(temperature), c10::Error) << temperature;
  }
}

}  // namespace
}  // namespace refinery::distill
