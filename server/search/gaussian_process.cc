#include "server/search/gaussian_process.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlopt.hpp>

namespace refinery::search {
namespace {

constexpr double kLog2Pi = 1.8378770664093454836;

double SquaredDifference(const Observations& data, int axis, double a, double b) {
  if (data.categorical[axis]) return a == b ? 0.0 : 1.0;
  return (a - b) * (a - b);
}

double SquaredDistance(const Observations& data, const Kernel& kernel, const Eigen::VectorXd& a,
                       const Eigen::VectorXd& b) {
  double sum = 0;
  for (int i = 0; i < kernel.theta.size(); ++i) sum += kernel.theta[i] * SquaredDifference(data, i, a[i], b[i]);
  return sum;
}

// Derivative of Matern52; this form has no 0/0 at distance 0.
double Matern52Slope(double d2) {
  const double root = std::sqrt(5 * d2);
  return -5.0 / 6 * (1 + root) * std::exp(-root);
}

Eigen::MatrixXd SquaredDistances(const Observations& data, const Kernel& kernel) {
  const int n = static_cast<int>(data.points.rows());
  Eigen::MatrixXd d2 = Eigen::MatrixXd::Zero(n, n);
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < i; ++j)
      d2(i, j) = d2(j, i) =
          SquaredDistance(data, kernel, data.points.row(i).transpose(), data.points.row(j).transpose());
  return d2;
}

Eigen::MatrixXd Covariance(const Observations& data, const Kernel& kernel) {
  Eigen::MatrixXd covariance = SquaredDistances(data, kernel).unaryExpr(&Matern52) * kernel.signal_variance;
  covariance.diagonal() += (kernel.noise_variance / data.counts.array()).matrix();
  return covariance;
}

Kernel FromVariables(const std::vector<double>& x) {
  const auto d = static_cast<int>(x.size()) - 2;
  Kernel kernel{.theta = Eigen::VectorXd(d)};
  for (int i = 0; i < d; ++i) kernel.theta[i] = std::exp(x[i]);
  kernel.signal_variance = std::exp(x[d]);
  kernel.noise_variance = std::exp(x[d + 1]) + kMinNoise;
  return kernel;
}

}  // namespace

double Matern52(double d2) {
  const double root = std::sqrt(5 * d2);
  return (1 + root + 5.0 / 3 * d2) * std::exp(-root);
}

double LogLikelihood(const Observations& data, const Kernel& kernel, Eigen::VectorXd* gradient) {
  const auto n = static_cast<int>(data.points.rows());
  const auto d = static_cast<int>(kernel.theta.size());
  const double noise = kernel.noise_variance;
  const Eigen::LLT<Eigen::MatrixXd> factor(Covariance(data, kernel));
  if (factor.info() != Eigen::Success) return -std::numeric_limits<double>::infinity();
  const Eigen::VectorXd weights = factor.solve(data.means);
  const double log_determinant = 2 * Eigen::MatrixXd(factor.matrixL()).diagonal().array().log().sum();
  double value = -0.5 * (data.means.dot(weights) + log_determinant + n * kLog2Pi);
  // The deviations of the replicates from their mean: counts - 1 free Gaussians per point.
  const double spare = (data.counts.array() - 1).sum();
  value -= 0.5 * (spare * (kLog2Pi + std::log(noise)) + data.squares.sum() / noise + data.counts.array().log().sum());
  if (gradient == nullptr) return value;

  // dL/dp = tr((w w^T - C^-1) dC/dp) / 2
  const Eigen::MatrixXd inner = 0.5 * (weights * weights.transpose() - factor.solve(Eigen::MatrixXd::Identity(n, n)));
  const Eigen::MatrixXd d2 = SquaredDistances(data, kernel);
  const Eigen::MatrixXd slope = d2.unaryExpr(&Matern52Slope) * kernel.signal_variance;
  gradient->setZero(d + 2);
  for (int axis = 0; axis < d; ++axis) {
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j < n; ++j) {
        const double difference = SquaredDifference(data, axis, data.points(i, axis), data.points(j, axis));
        (*gradient)[axis] += inner(i, j) * slope(i, j) * difference * kernel.theta[axis];
      }
    }
  }
  (*gradient)[d] = (inner.array() * d2.unaryExpr(&Matern52).array()).sum() * kernel.signal_variance;
  const double by_noise = (inner.diagonal().array() / data.counts.array()).sum() - 0.5 * spare / noise +
                          0.5 * data.squares.sum() / (noise * noise);
  (*gradient)[d + 1] = by_noise * (noise - kMinNoise);
  return value;
}

double LogPrior(const Kernel& kernel, Eigen::VectorXd* gradient) {
  const auto d = static_cast<int>(kernel.theta.size());
  const double noise = kernel.noise_variance;
  double value = -(0.1 / kernel.theta.array() + 0.1 * kernel.theta.array()).sum();
  value += std::log(kernel.signal_variance) - kernel.signal_variance;
  value += 0.1 * std::log(noise) - 30 * noise;
  if (gradient != nullptr) {
    gradient->setZero(d + 2);
    gradient->head(d) = (0.1 / kernel.theta.array() - 0.1 * kernel.theta.array()).matrix();
    (*gradient)[d] = 1 - kernel.signal_variance;
    (*gradient)[d + 1] = (0.1 / noise - 30) * (noise - kMinNoise);
  }
  return value;
}

Kernel FitKernel(const Observations& data) {
  const auto d = static_cast<int>(data.points.cols());
  nlopt::vfunc objective = [](const std::vector<double>& x, std::vector<double>& slope, void* context) {
    const auto& observations = *static_cast<const Observations*>(context);
    const Kernel kernel = FromVariables(x);
    Eigen::VectorXd by_data;
    Eigen::VectorXd by_prior;
    double value = LogLikelihood(observations, kernel, &by_data) + LogPrior(kernel, &by_prior);
    if (!std::isfinite(value)) {  // not positive definite: a wall
      std::fill(slope.begin(), slope.end(), 0.0);
      return -1e10;
    }
    for (size_t i = 0; i < slope.size(); ++i) slope[i] = by_data[static_cast<int>(i)] + by_prior[static_cast<int>(i)];
    return value;
  };
  nlopt::opt optimizer(nlopt::LD_LBFGS, d + 2);
  optimizer.set_max_objective(objective, const_cast<Observations*>(&data));
  // Length scales from 0.03 to 30 of the cube's edge.
  std::vector<double> lower(d, std::log(1e-3)), upper(d, std::log(1e3));
  lower.insert(lower.end(), {std::log(1e-3), std::log(1e-8)});
  upper.insert(upper.end(), {std::log(1e2), std::log(1e1)});
  optimizer.set_lower_bounds(lower);
  optimizer.set_upper_bounds(upper);
  optimizer.set_ftol_abs(1e-7);
  optimizer.set_maxeval(200);

  // The surface has several maxima, chiefly "all noise" and "all signal".
  std::vector<double> best;
  double best_value = -std::numeric_limits<double>::infinity();
  for (double theta : {1.0, 10.0, 0.1}) {
    for (double noise : {0.02, 1e-4}) {
      std::vector<double> x(d, std::log(theta));
      x.insert(x.end(), {0.0, std::log(noise)});
      double value = -std::numeric_limits<double>::infinity();
      try {
        optimizer.optimize(x, value);
      } catch (const std::exception&) {
        // NLopt throws when rounding ends its line search; x holds the best point so far.
        std::vector<double> none;
        value = objective(x, none, const_cast<Observations*>(&data));
      }
      if (value > best_value) {
        best_value = value;
        best = x;
      }
    }
  }
  if (best.empty()) best.assign(d + 2, 0.0);
  return FromVariables(best);
}

GaussianProcess::GaussianProcess(Observations data, Kernel kernel)
    : data_(std::move(data)), kernel_(std::move(kernel)), factor_(Covariance(data_, kernel_)) {
  weights_ = factor_.solve(data_.means);
}

GaussianProcess::Prediction GaussianProcess::At(const Eigen::VectorXd& point) const {
  Eigen::VectorXd cross(data_.points.rows());
  for (int i = 0; i < cross.size(); ++i)
    cross[i] =
        kernel_.signal_variance * Matern52(SquaredDistance(data_, kernel_, data_.points.row(i).transpose(), point));
  const Eigen::VectorXd half = factor_.matrixL().solve(cross);
  return {.mean = cross.dot(weights_), .variance = std::max(0.0, kernel_.signal_variance - half.squaredNorm())};
}

GaussianProcess GaussianProcess::WithFantasy(const Eigen::VectorXd& point, double count) const {
  Observations data = data_;
  const auto n = data.points.rows();
  const double mean = At(point).mean;
  data.points.conservativeResize(n + 1, Eigen::NoChange);
  data.points.row(n) = point.transpose();
  for (auto [vector, value] : {std::pair{&data.means, mean}, {&data.counts, count}, {&data.squares, 0.0}}) {
    vector->conservativeResize(n + 1);
    (*vector)[n] = value;
  }
  return GaussianProcess(std::move(data), kernel_);
}

}  // namespace refinery::search
