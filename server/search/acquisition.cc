#include "server/search/acquisition.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlopt.hpp>

#include "server/search/sobol.h"

namespace refinery::search {
namespace {

constexpr int kCandidates = 1024;  // per choice
constexpr int kStarts = 5;         // per choice
constexpr int kLocalEvaluations = 150;
constexpr double kLogSqrt2Pi = 0.91893853320467274178;
constexpr double kSqrtHalfPi = 1.25331413731550025121;

struct Scored {
  std::vector<double> uniform;
  v1::TrialSettings settings;
  double value = -std::numeric_limits<double>::infinity();
};

// Scores settings and remembers the best that is not taken.
class Scorer {
 public:
  Scorer(const GaussianProcess& process, double best, const Space& space, const std::vector<v1::TrialSettings>& taken)
      : process_(process), best_(best), space_(space), taken_(taken) {}

  // Of taken settings too, so that a local search can walk across them.
  Scored Score(const std::vector<double>& uniform) {
    Scored scored{.uniform = uniform, .settings = space_.Decode(uniform)};
    const auto prediction = process_.At(space_.Encode(scored.settings));
    scored.value = LogExpectedImprovement(prediction.mean, prediction.variance, best_);
    if (!(scored.value > winner_.value)) return scored;
    for (const v1::TrialSettings& other : taken_)
      if (SameSettings(other, scored.settings)) return scored;
    winner_ = scored;
    return scored;
  }

  const Scored& winner() const { return winner_; }

 private:
  const GaussianProcess& process_;
  double best_;
  const Space& space_;
  const std::vector<v1::TrialSettings>& taken_;
  Scored winner_;
};

// Climbs from `start` along the numeric axes; the scorer keeps what it meets.
void SearchLocally(const Space& space, const std::vector<double>& start, Scorer* scorer) {
  std::vector<int> axes;
  for (int i = 0; i < space.Axes(); ++i)
    if (!space.IsCategorical(i)) axes.push_back(i);
  if (axes.empty()) return;
  struct Context {
    const std::vector<int>& axes;
    std::vector<double> uniform;
    Scorer* scorer;
  } context{axes, start, scorer};
  nlopt::vfunc objective = [](const std::vector<double>& x, std::vector<double>&, void* data) {
    auto& c = *static_cast<Context*>(data);
    for (size_t i = 0; i < x.size(); ++i) c.uniform[c.axes[i]] = x[i];
    return c.scorer->Score(c.uniform).value;
  };
  nlopt::opt optimizer(nlopt::LN_SBPLX, static_cast<unsigned>(axes.size()));
  optimizer.set_max_objective(objective, &context);
  optimizer.set_lower_bounds(0.0);
  optimizer.set_upper_bounds(1.0);
  optimizer.set_initial_step(0.05);
  optimizer.set_xtol_abs(1e-5);
  optimizer.set_maxeval(kLocalEvaluations);
  std::vector<double> x;
  for (int axis : axes) x.push_back(start[axis]);
  double value = 0;
  try {
    optimizer.optimize(x, value);
  } catch (const std::exception&) {
    // Ended by rounding; what it met so far is kept.
  }
}

// The point of the lowest posterior mean among the observed ones, as uniform coordinates.
std::vector<double> IncumbentPoint(const GaussianProcess& process, const Space& space) {
  const Eigen::MatrixXd& points = process.data().points;
  int best = 0;
  for (int i = 1; i < points.rows(); ++i)
    if (process.At(points.row(i).transpose()).mean < process.At(points.row(best).transpose()).mean) best = i;
  std::vector<double> uniform(points.cols());
  for (int axis = 0; axis < points.cols(); ++axis) {
    const double value = points(best, axis);
    uniform[axis] = space.IsCategorical(axis) ? (value + 0.5) / space.Choices() : std::clamp(value, 0.0, 1.0);
  }
  return uniform;
}

}  // namespace

double LogExpectedPositivePart(double z) {
  if (z > -1) {
    const double density = std::exp(-0.5 * z * z - kLogSqrt2Pi);
    return std::log(density + z * 0.5 * std::erfc(-z / std::sqrt(2.0)));
  }
  const double log_density = -0.5 * z * z - kLogSqrt2Pi;
  if (z > -30) {
    // erfcx by its definition: neither factor over- or underflows here.
    const double scaled = std::exp(0.5 * z * z) * std::erfc(-z / std::sqrt(2.0));
    return log_density + std::log1p(kSqrtHalfPi * z * scaled);
  }
  // Mills' ratio in powers of 1 / z^2; the first term left out is 10395 / z^10, below 2e-11 of the sum.
  const double r = 1 / (z * z);
  return log_density + std::log(r) + std::log1p(r * (-3 + r * (15 + r * (-105 + r * 945))));
}

double LogExpectedImprovement(double mean, double variance, double best) {
  const double deviation = std::sqrt(variance + 1e-12);
  return LogExpectedPositivePart((best - mean) / deviation) + std::log(deviation);
}

double Incumbent(const GaussianProcess& process) {
  double best = std::numeric_limits<double>::infinity();
  for (int i = 0; i < process.data().points.rows(); ++i)
    best = std::min(best, process.At(process.data().points.row(i).transpose()).mean);
  return best;
}

Candidate MaximizeImprovement(const GaussianProcess& process, double best, const Space& space,
                              const std::vector<v1::TrialSettings>& taken, uint64_t seed) {
  Scorer scorer(process, best, space, taken);
  const std::vector<double> incumbent = IncumbentPoint(process, space);
  ScrambledSobol sobol(space.Axes(), seed);
  std::vector<std::vector<double>> points;
  for (int i = 0; i < kCandidates; ++i) points.push_back(sobol.Next());
  for (int choice = 0; choice < space.Choices(); ++choice) {
    auto with_choice = [&](std::vector<double> uniform) {
      if (space.CategoricalAxis() >= 0) uniform[space.CategoricalAxis()] = (choice + 0.5) / space.Choices();
      return uniform;
    };
    std::vector<Scored> scored = {scorer.Score(with_choice(incumbent))};
    for (const auto& point : points) scored.push_back(scorer.Score(with_choice(point)));
    std::stable_sort(scored.begin() + 1, scored.end(),
                     [](const Scored& a, const Scored& b) { return a.value > b.value; });
    for (int start = 0; start <= kStarts; ++start) SearchLocally(space, scored[start].uniform, &scorer);
  }
  const Scored& winner = scorer.winner();
  return {.settings = winner.settings, .log_improvement = winner.value, .found = !winner.uniform.empty()};
}

}  // namespace refinery::search
