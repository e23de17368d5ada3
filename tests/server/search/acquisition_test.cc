#include "server/search/acquisition.h"

#include <gtest/gtest.h>

#include <cmath>
#include <numbers>

namespace refinery::search {
namespace {

// log of the integral of u * phi(u - z) over u > 0, with exp(-z^2 / 2) taken out so that nothing underflows:
// Simpson's rule in long double over the width where exp(u z - u^2 / 2) matters.
double ByIntegration(double z) {
  const long double width = z < -1 ? 60.0L / -z : 12.0L + (z > 0 ? z : 0);
  constexpr int kSlices = 200000;
  const long double h = width / kSlices;
  auto f = [&](int i) {
    const long double u = i * h;
    return u * std::exp(u * z - u * u / 2);
  };
  long double sum = f(0) + f(kSlices);
  for (int i = 1; i < kSlices; ++i) sum += (i % 2 == 1 ? 4 : 2) * f(i);
  return static_cast<double>(std::log(sum * h / 3) - static_cast<long double>(z) * z / 2 -
                             std::log(2 * std::numbers::pi_v<long double>) / 2);
}

// Goal: right to 1e-8 on every branch, also far where exp() would be 0.  Method: numerical integration.
TEST(AcquisitionTest, LogExpectedPositivePartMatchesIntegration) {
  for (double z :
       {-2000.0, -100.0, -40.0, -31.0, -30.0, -29.9, -12.0, -5.0, -1.5, -1.0, -0.999, -0.3, 0.0, 0.7, 3.0, 9.0})
    EXPECT_NEAR(LogExpectedPositivePart(z), ByIntegration(z), 1e-8 * std::max(1.0, std::abs(ByIntegration(z)))) << z;
}

TEST(AcquisitionTest, LogExpectedPositivePartRisesAcrossItsBranches) {
  for (double border : {-30.0, -1.0})
    for (double step : {1e-3, 1e-6})
      EXPECT_LT(LogExpectedPositivePart(border - step), LogExpectedPositivePart(border + step));
  EXPECT_TRUE(std::isfinite(LogExpectedPositivePart(-1e8)));
}

// Goal: the improvement of a normal below `best`.  Method: E[max(0, best - f)] by integration with plain densities.
TEST(AcquisitionTest, LogExpectedImprovementMatchesIntegration) {
  const double mean = 0.4;
  const double deviation = 0.3;
  const double best = 0.1;
  double sum = 0;
  constexpr double kStep = 1e-5;
  for (double f = best - 5; f < best; f += kStep) {
    const double middle = f + kStep / 2;
    const double z = (middle - mean) / deviation;
    sum += (best - middle) * std::exp(-z * z / 2) / (deviation * std::sqrt(2 * std::numbers::pi)) * kStep;
  }
  EXPECT_NEAR(LogExpectedImprovement(mean, deviation * deviation, best), std::log(sum), 1e-5);
}

}  // namespace
}  // namespace refinery::search
