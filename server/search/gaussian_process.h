// server/search/gaussian_process.h
//
// Gaussian process regression with a Matern-5/2 kernel and one length scale per axis, on replicated observations.
//
//   k(x, x') = s * (1 + sqrt(5) d + 5 d^2 / 3) * exp(-sqrt(5) d),   d^2 = sum_i theta_i * (x_i - x'_i)^2
//   (of a categorical axis the difference is 0 or 1);   observation of replicate r at point i:  f(x_i) + N(0, noise)
//
// The likelihood is that of all single replicates. It depends on them only through each point's mean, count and sum of
// squared deviations from the mean: log N(means; 0, K + diag(noise / counts)) plus the density of the deviations. So
// the spread between replicates teaches the noise level, and a point with more replicates is trusted more, at the price
// of a solve of size [points], not [observations].
//
// Sources: kernel and priors as in Optuna's GPSampler (v4.5); Rasmussen and Williams 2006, ch. 2 and 5.
// Threads: values only; safe to share when const.

#pragma once

#include <Eigen/Cholesky>
#include <Eigen/Core>
#include <vector>

namespace refinery::search {

// n points with d axes.
struct Observations {
  Eigen::MatrixXd points;         // [n, d]
  std::vector<bool> categorical;  // [d]
  Eigen::VectorXd means;          // [n] of the replicates, standardised (mean 0, deviation 1)
  Eigen::VectorXd counts;         // [n] replicates, >= 1
  Eigen::VectorXd squares;        // [n] sum of squared deviations of the replicates from their mean; 0 for one
};

struct Kernel {
  Eigen::VectorXd theta;       // [d] inverse squared length scales, > 0
  double signal_variance = 1;  // s, > 0
  double noise_variance = 1;   // of one replicate, > kMinNoise
};

inline constexpr double kMinNoise = 1e-6;

// Correlation at squared scaled distance `d2` >= 0; 1 at 0.
double Matern52(double d2);

// Log density of every replicate under `kernel`; -infinity when the covariance is not positive definite. With
// `gradient`
// ([d + 2]) its derivatives with respect to log theta_i, log s and log(noise - kMinNoise).
double LogLikelihood(const Observations& data, const Kernel& kernel, Eigen::VectorXd* gradient = nullptr);

// Log density (up to a constant) of the priors, in the same variables:  sum_i -(0.1 / theta_i + 0.1 theta_i),
// s ~ Gamma(2, 1), noise ~ Gamma(1.1, 30) (shape, rate).
double LogPrior(const Kernel& kernel, Eigen::VectorXd* gradient = nullptr);

// The kernel that maximises LogLikelihood + LogPrior, found by L-BFGS from several fixed starts.
Kernel FitKernel(const Observations& data);

class GaussianProcess {
 public:
  GaussianProcess(Observations data, Kernel kernel);

  struct Prediction {
    double mean = 0;
    double variance = 0;  // of f, without the noise of an observation; >= 0
  };
  Prediction At(const Eigen::VectorXd& point) const;

  const Kernel& kernel() const { return kernel_; }
  const Observations& data() const { return data_; }

  // The same process after an observation at `point` that came out as predicted (a "Kriging believer" fantasy): the
  // mean stays, the uncertainty near the point shrinks.
  GaussianProcess WithFantasy(const Eigen::VectorXd& point, double count) const;

 private:
  Observations data_;
  Kernel kernel_;
  Eigen::LLT<Eigen::MatrixXd> factor_;  // of K + diag(noise / counts)
  Eigen::VectorXd weights_;             // its inverse times the means
};

}  // namespace refinery::search
