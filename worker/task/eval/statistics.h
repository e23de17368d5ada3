// worker/task/eval/statistics.h
//
// How sure a score is, and whether two models differ on the same items.
//
// Sources: lm_eval/api/metrics.py 0.4.13 (bootstrap_stderr, with its random numbers); McNemar 1947, exact form (the binomial
// test of the discordant pairs); percentile bootstrap over items (Efron and Tibshirani 1993, ch. 13).
// Threads: pure functions.

#pragma once

#include <cstdint>
#include <functional>
#include <vector>

namespace refinery::eval {

// Mean and its sample standard error (n - 1); 0 for fewer than two values.
struct MeanAndError {
  double mean = 0, standard_error = 0;
};
MeanAndError MeanOf(const std::vector<double>& values);

// bootstrap_stderr(f, xs, iterations) of the harness: chunks of 1,000 resamples, chunk i drawn with random.Random(i); the sample
// standard deviation of f over the resamples. 0 for fewer than two values.
double HarnessBootstrapError(const std::vector<double>& values, int64_t iterations,
                             const std::function<double(const std::vector<double>&)>& statistic);

// The two-sided exact test that both kinds of discordant pairs are equally likely: a right and b wrong, and the other way round.
// 1 where there are none.
double McNemarExact(int64_t only_a, int64_t only_b);

struct PairedDifference {
  double difference = 0;              // mean of a - b
  double low = 0, high = 0;           // 95 % interval, percentiles of resampled means
  int64_t only_a = 0, only_b = 0;     // items that only one of them has right
  double p_value = 1;                 // McNemar's
};
// Scores of the same items by two models, each 0 or 1. Sizes must be equal and not 0. The resamples follow from `seed` alone.
PairedDifference ComparePaired(const std::vector<double>& a, const std::vector<double>& b, int64_t resamples = 10'000,
                               uint64_t seed = 1234);

}  // namespace refinery::eval
