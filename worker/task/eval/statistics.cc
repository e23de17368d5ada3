#include "worker/task/eval/statistics.h"

#include <algorithm>
#include <cmath>

#include "common/status.h"
#include "worker/task/data/random.h"

namespace refinery::eval {

MeanAndError MeanOf(const std::vector<double>& values) {
  if (values.empty()) return {};
  const double n = static_cast<double>(values.size());
  double sum = 0;
  for (const double value : values) sum += value;
  const double mean = sum / n;
  double squares = 0;
  for (const double value : values) squares += (value - mean) * (value - mean);
  return {mean, values.size() < 2 ? 0 : std::sqrt(squares / (n - 1) / n)};
}

double HarnessBootstrapError(const std::vector<double>& values, int64_t iterations,
                             const std::function<double(const std::vector<double>&)>& statistic) {
  if (values.size() < 2 || iterations < 2) return 0;
  const int64_t chunk = std::min<int64_t>(1000, iterations);
  const double n = static_cast<double>(values.size());
  std::vector<double> resample(values.size()), results;
  for (int64_t i = 0; i < iterations / chunk; ++i) {
    data::PythonRandom random(static_cast<uint32_t>(i));
    for (int64_t draw = 0; draw < chunk; ++draw) {
      for (double& value : resample) value = values[static_cast<size_t>(random.Double() * n)];
      results.push_back(statistic(resample));
    }
  }
  // The standard deviation is that of the resamples, not that of their mean.
  return MeanOf(results).standard_error * std::sqrt(static_cast<double>(results.size()));
}

double McNemarExact(int64_t only_a, int64_t only_b) {
  const int64_t n = only_a + only_b, least = std::min(only_a, only_b);
  if (n == 0) return 1;
  const double total = static_cast<double>(n);
  double tail = 0;
  for (int64_t k = 0; k <= least; ++k) {
    const double kept = static_cast<double>(k);
    tail += std::exp(std::lgamma(total + 1) - std::lgamma(kept + 1) - std::lgamma(total - kept + 1) - total * std::log(2.0));
  }
  return std::min(1.0, 2 * tail);
}

PairedDifference ComparePaired(const std::vector<double>& a, const std::vector<double>& b, int64_t resamples, uint64_t seed) {
  RF_CHECK(a.size() == b.size() && !a.empty() && resamples > 0);
  PairedDifference result;
  std::vector<double> differences;
  for (size_t i = 0; i < a.size(); ++i) {
    differences.push_back(a[i] - b[i]);
    result.only_a += a[i] > b[i] ? 1 : 0;
    result.only_b += a[i] < b[i] ? 1 : 0;
  }
  result.difference = MeanOf(differences).mean;
  result.p_value = McNemarExact(result.only_a, result.only_b);
  data::SeededRandom random(seed);
  std::vector<double> means;
  for (int64_t draw = 0; draw < resamples; ++draw) {
    double sum = 0;
    for (size_t i = 0; i < differences.size(); ++i) sum += differences[random.Below(differences.size())];
    means.push_back(sum / static_cast<double>(differences.size()));
  }
  std::sort(means.begin(), means.end());
  // Linear interpolation between order statistics, as numpy.percentile does.
  const auto percentile = [&](double share) {
    const double at = share * static_cast<double>(means.size() - 1);
    const size_t below = static_cast<size_t>(at), above = std::min(below + 1, means.size() - 1);
    return means[below] + (at - static_cast<double>(below)) * (means[above] - means[below]);
  };
  result.low = percentile(0.025);
  result.high = percentile(0.975);
  return result;
}

}  // namespace refinery::eval
