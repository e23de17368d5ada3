#include "server/search/gaussian_process.h"

#include <gtest/gtest.h>

#include <Eigen/LU>
#include <cmath>
#include <numbers>
#include <random>

namespace refinery::search {
namespace {

// The kernel again, written from the formula in Rasmussen and Williams (4.17) over length scales instead of theta.
double Reference52(const Eigen::VectorXd& a, const Eigen::VectorXd& b, const Kernel& kernel,
                   const std::vector<bool>& categorical) {
  double r2 = 0;
  for (int i = 0; i < a.size(); ++i) {
    const double length = 1 / std::sqrt(kernel.theta[i]);
    const double difference = categorical[i] ? (a[i] != b[i] ? 1.0 : 0.0) : std::abs(a[i] - b[i]);
    r2 += std::pow(difference / length, 2);
  }
  const double r = std::sqrt(r2);
  return kernel.signal_variance * (1 + std::sqrt(5) * r + 5 * r * r / 3) * std::exp(-std::sqrt(5) * r);
}

struct Sample {
  Observations data;
  Eigen::MatrixXd single_points;  // one row per replicate
  Eigen::VectorXd single_values;
};

// Points with 1 to 3 replicates each; the third axis is categorical.
Sample MakeSample(uint32_t seed, int n) {
  std::mt19937 random(seed);
  std::uniform_real_distribution<double> uniform(0, 1);
  std::normal_distribution<double> normal(0, 1);
  Sample sample;
  Observations& data = sample.data;
  data.points = Eigen::MatrixXd(n, 3);
  data.categorical = {false, false, true};
  data.means = data.counts = data.squares = Eigen::VectorXd::Zero(n);
  std::vector<std::pair<int, double>> singles;
  for (int i = 0; i < n; ++i) {
    data.points.row(i) << uniform(random), uniform(random), static_cast<double>(i % 2);
    const double centre = normal(random);
    std::vector<double> values(1 + i % 3);
    for (double& value : values) value = centre + 0.2 * normal(random);
    data.counts[i] = static_cast<double>(values.size());
    for (double value : values) data.means[i] += value / data.counts[i];
    for (double value : values) data.squares[i] += std::pow(value - data.means[i], 2);
    for (double value : values) singles.emplace_back(i, value);
  }
  sample.single_points = Eigen::MatrixXd(singles.size(), 3);
  sample.single_values = Eigen::VectorXd(singles.size());
  for (size_t k = 0; k < singles.size(); ++k) {
    sample.single_points.row(k) = data.points.row(singles[k].first);
    sample.single_values[k] = singles[k].second;
  }
  return sample;
}

Kernel SomeKernel() {
  return {.theta = Eigen::Vector3d(2.0, 0.5, 1.3), .signal_variance = 0.8, .noise_variance = 0.05};
}

// Covariance of all single replicates, noise included.
Eigen::MatrixXd SingleCovariance(const Sample& sample, const Kernel& kernel) {
  const auto n = sample.single_values.size();
  Eigen::MatrixXd covariance(n, n);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j)
      covariance(i, j) = Reference52(sample.single_points.row(i).transpose(), sample.single_points.row(j).transpose(),
                                     kernel, sample.data.categorical) +
                         (i == j ? kernel.noise_variance : 0);
  return covariance;
}

// Goal: the likelihood from means, counts and squares is that of every single replicate.  Method: the density of the
// full normal vector, with an explicit inverse and determinant.
TEST(GaussianProcessTest, LogLikelihoodIsThatOfAllReplicates) {
  for (uint32_t seed : {1u, 2u, 3u}) {
    const Sample sample = MakeSample(seed, 7);
    const Kernel kernel = SomeKernel();
    const Eigen::MatrixXd covariance = SingleCovariance(sample, kernel);
    const double quadratic = sample.single_values.dot(covariance.inverse() * sample.single_values);
    const double expected = -0.5 * (quadratic + std::log(covariance.determinant()) +
                                    static_cast<double>(sample.single_values.size()) * std::log(2 * std::numbers::pi));
    EXPECT_NEAR(LogLikelihood(sample.data, kernel), expected, 1e-9 * std::abs(expected));
  }
}

// Goal: mean and variance are those of conditioning on every single replicate.  Method: explicit inverse.
TEST(GaussianProcessTest, PosteriorIsTheConditionalNormal) {
  const Sample sample = MakeSample(4, 8);
  const Kernel kernel = SomeKernel();
  const Eigen::MatrixXd inverse = SingleCovariance(sample, kernel).inverse();
  const GaussianProcess process(sample.data, kernel);
  for (const Eigen::Vector3d& point :
       {Eigen::Vector3d(0.1, 0.9, 0), Eigen::Vector3d(0.5, 0.4, 1), Eigen::Vector3d(2, -1, 1)}) {
    Eigen::VectorXd cross(sample.single_values.size());
    for (int i = 0; i < cross.size(); ++i)
      cross[i] = Reference52(sample.single_points.row(i).transpose(), point, kernel, sample.data.categorical);
    const auto prediction = process.At(point);
    EXPECT_NEAR(prediction.mean, cross.dot(inverse * sample.single_values), 1e-10);
    EXPECT_NEAR(prediction.variance, kernel.signal_variance - cross.dot(inverse * cross), 1e-10);
  }
}

// Goal: the gradients are right.  Method: central differences in the same variables.
TEST(GaussianProcessTest, GradientsMatchDifferences) {
  const Sample sample = MakeSample(5, 9);
  auto shifted = [](int variable, double by) {
    Kernel kernel = SomeKernel();
    if (variable < 3) kernel.theta[variable] *= std::exp(by);
    if (variable == 3) kernel.signal_variance *= std::exp(by);
    if (variable == 4) kernel.noise_variance = kMinNoise + (kernel.noise_variance - kMinNoise) * std::exp(by);
    return kernel;
  };
  Eigen::VectorXd by_data;
  Eigen::VectorXd by_prior;
  LogLikelihood(sample.data, SomeKernel(), &by_data);
  LogPrior(SomeKernel(), &by_prior);
  constexpr double kStep = 1e-5;
  for (int variable = 0; variable < 5; ++variable) {
    const Kernel up = shifted(variable, kStep);
    const Kernel down = shifted(variable, -kStep);
    EXPECT_NEAR(by_data[variable], (LogLikelihood(sample.data, up) - LogLikelihood(sample.data, down)) / (2 * kStep),
                1e-6);
    EXPECT_NEAR(by_prior[variable], (LogPrior(up) - LogPrior(down)) / (2 * kStep), 1e-6);
  }
}

// Goal: the fit is a maximum.  Method: no step of 5 % or 50 % along any variable is better.
TEST(GaussianProcessTest, FitIsALocalMaximum) {
  for (uint32_t seed : {6u, 7u}) {
    const Sample sample = MakeSample(seed, 12);
    const Kernel fit = FitKernel(sample.data);
    auto value = [&](const Kernel& kernel) { return LogLikelihood(sample.data, kernel) + LogPrior(kernel); };
    for (double factor : {0.5, 0.95, 1.05, 1.5}) {
      for (int variable = 0; variable < 5; ++variable) {
        Kernel other = fit;
        if (variable < 3) other.theta[variable] *= factor;
        if (variable == 3) other.signal_variance *= factor;
        if (variable == 4) other.noise_variance = kMinNoise + (fit.noise_variance - kMinNoise) * factor;
        EXPECT_LE(value(other), value(fit) + 1e-5) << "variable " << variable << " times " << factor;
      }
    }
  }
}

// Goal: replicates teach the noise.  Method: 40 points with 4 replicates each of known noise.
TEST(GaussianProcessTest, FitFindsTheNoiseOfReplicates) {
  std::mt19937 random(8);
  std::normal_distribution<double> normal(0, 1);
  constexpr double kNoise = 0.03;  // variance
  Observations data{.points = Eigen::MatrixXd(40, 1), .categorical = {false}};
  data.means = data.squares = Eigen::VectorXd::Zero(40);
  data.counts = Eigen::VectorXd::Constant(40, 4);
  for (int i = 0; i < 40; ++i) {
    data.points(i, 0) = i / 40.0;
    std::vector<double> values(4);
    for (double& value : values) value = std::sin(6.0 * i / 40) + std::sqrt(kNoise) * normal(random);
    for (double value : values) data.means[i] += value / 4;
    for (double value : values) data.squares[i] += std::pow(value - data.means[i], 2);
  }
  EXPECT_NEAR(FitKernel(data).noise_variance, kNoise, 0.4 * kNoise);
}

TEST(GaussianProcessTest, FantasyKeepsTheMeanAndShrinksTheVariance) {
  const Sample sample = MakeSample(9, 6);
  const GaussianProcess process(sample.data, SomeKernel());
  const Eigen::Vector3d point(0.3, 0.3, 1);
  const GaussianProcess after = process.WithFantasy(point, 2);
  for (const Eigen::Vector3d& other : {point, Eigen::Vector3d(0.4, 0.2, 1), Eigen::Vector3d(0.9, 0.9, 0)}) {
    EXPECT_NEAR(after.At(other).mean, process.At(other).mean, 1e-10);
    EXPECT_LT(after.At(other).variance, process.At(other).variance);
  }
}

}  // namespace
}  // namespace refinery::search
