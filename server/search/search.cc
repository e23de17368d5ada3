#include "server/search/search.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>

#include "common/digest.h"
#include "server/search/acquisition.h"
#include "server/search/gaussian_process.h"
#include "server/search/sobol.h"
#include "server/search/space.h"

namespace refinery::search {
namespace {

constexpr int kSobolTries = 4096;  // points looked at until enough different settings are found

// Index of the first trial of the round that holds trial `index`.
uint32_t RoundStart(const v1::Search& search, uint32_t index) {
  const uint32_t initial = search.initial_trials();
  if (index < initial) return 0;
  const uint32_t parallel = std::max<uint32_t>(1, search.parallel());
  return initial + (index - initial) / parallel * parallel;
}

bool IsFinished(const v1::Trial& trial) {
  return trial.state() == v1::Trial::SUCCEEDED || trial.state() == v1::Trial::INFEASIBLE ||
         trial.state() == v1::Trial::STOPPED_EARLY;
}

const v1::Trial* FindTrial(const std::vector<v1::Trial>& trials, uint32_t index) {
  for (const v1::Trial& trial : trials)
    if (trial.index() == index) return &trial;
  return nullptr;
}

bool Contains(const std::vector<v1::TrialSettings>& list, const v1::TrialSettings& settings) {
  return std::any_of(list.begin(), list.end(), [&](const auto& other) { return SameSettings(other, settings); });
}

v1::Trial NewTrial(const v1::Recipe& recipe, uint32_t index, const v1::TrialSettings& settings,
                   const std::string& origin) {
  v1::Trial trial;
  trial.set_index(index);
  trial.set_state(v1::Trial::ACTIVE);
  *trial.mutable_settings() = settings;
  trial.set_origin(origin);
  for (uint32_t r = 0; r < std::max<uint32_t>(1, recipe.search().replicates()); ++r)
    trial.add_replicates()->set_index(r);
  return trial;
}

// The first `count` different settings along the Sobol sequence, without `taken`. Fewer when the space has no more or
// they are rare on the sequence.
std::vector<v1::TrialSettings> SobolSettings(const v1::Recipe& recipe, const Space& space, uint32_t count,
                                             std::vector<v1::TrialSettings> taken) {
  ScrambledSobol sobol(static_cast<uint32_t>(space.Axes()), DeriveSeed(recipe.seed(), "search/sobol"));
  std::vector<v1::TrialSettings> found;
  for (int i = 0; i < kSobolTries && found.size() < count; ++i) {
    v1::TrialSettings settings = space.Decode(sobol.Next());
    if (Contains(taken, settings)) continue;
    taken.push_back(settings);
    found.push_back(std::move(settings));
  }
  return found;
}

// Population mean and deviation over the trials that have a finite objective.
struct Scale {
  double mean = 0;
  double deviation = 1;
  double worst = 0;
};

bool HasValue(const v1::Trial& trial) { return trial.state() != v1::Trial::INFEASIBLE && std::isfinite(trial.mean()); }

Scale ScaleOf(const std::vector<double>& values) {
  Scale scale;
  for (double value : values) scale.mean += value / static_cast<double>(values.size());
  double square = 0;
  for (double value : values)
    square += (value - scale.mean) * (value - scale.mean) / static_cast<double>(values.size());
  scale.deviation = std::max(std::sqrt(square), 1e-10);
  return scale;
}

// The finished trials as standardised observations.
Observations Observe(const Space& space, const std::vector<const v1::Trial*>& finished, Scale* scale) {
  const auto n = static_cast<int>(finished.size());
  double worst = -std::numeric_limits<double>::infinity();
  for (const v1::Trial* trial : finished)
    if (HasValue(*trial)) worst = std::max(worst, trial->mean());
  if (!std::isfinite(worst)) worst = 0;  // every trial diverged: all are equally bad
  std::vector<double> values;
  for (const v1::Trial* trial : finished) values.push_back(HasValue(*trial) ? trial->mean() : worst);
  *scale = ScaleOf(values);

  Observations data{.points = Eigen::MatrixXd(n, space.Axes()),
                    .means = Eigen::VectorXd(n),
                    .counts = Eigen::VectorXd::Ones(n),
                    .squares = Eigen::VectorXd::Zero(n)};
  for (int axis = 0; axis < space.Axes(); ++axis) data.categorical.push_back(space.IsCategorical(axis));
  for (int i = 0; i < n; ++i) {
    data.points.row(i) = space.Encode(finished[i]->settings()).transpose();
    data.means[i] = (values[i] - scale->mean) / scale->deviation;
    if (!HasValue(*finished[i])) continue;
    int count = 0;
    for (const v1::Replicate& replicate : finished[i]->replicates()) {
      if (!replicate.finished() || replicate.infeasible()) continue;
      const double deviation = (replicate.objective() - finished[i]->mean()) / scale->deviation;
      data.squares[i] += deviation * deviation;
      ++count;
    }
    data.counts[i] = std::max(1, count);
  }
  return data;
}

// The first setting of a finite space that is not taken.
Candidate FirstFree(const Space& space, const std::vector<v1::TrialSettings>& taken) {
  Candidate candidate{.log_improvement = -std::numeric_limits<double>::infinity()};
  if (!std::isfinite(space.Size())) return candidate;
  const int choices = space.Choices();
  const int rest = static_cast<int>(space.Size()) / choices;  // at most one axis is left: the rank
  for (int i = 0; i < rest * choices && !candidate.found; ++i) {
    std::vector<double> uniform(space.Axes());
    for (int axis = 0; axis < space.Axes(); ++axis)
      uniform[axis] = space.IsCategorical(axis) ? (i % choices + 0.5) / choices : (i / choices + 0.5) / rest;
    candidate.settings = space.Decode(uniform);
    candidate.found = !Contains(taken, candidate.settings);
  }
  return candidate;
}

StatusOr<v1::Trial> SuggestByModel(const v1::Recipe& recipe, const Space& space, const std::vector<v1::Trial>& trials,
                                   uint32_t index) {
  const uint32_t round = RoundStart(recipe.search(), index);
  std::vector<const v1::Trial*> finished;
  std::vector<const v1::Trial*> running;  // of the same round: their results do not count even when they are there
  std::vector<v1::TrialSettings> taken;
  for (uint32_t i = 0; i < index; ++i) {
    const v1::Trial* trial = FindTrial(trials, i);
    (i < round ? finished : running).push_back(trial);
    taken.push_back(trial->settings());
  }
  Scale scale;
  Observations data = Observe(space, finished, &scale);
  Kernel kernel = FitKernel(data);
  GaussianProcess process(std::move(data), std::move(kernel));
  const double best = Incumbent(process);
  for (const v1::Trial* trial : running)
    process = process.WithFantasy(space.Encode(trial->settings()), std::max(1, trial->replicates_size()));

  const uint64_t seed = DeriveSeed(recipe.seed(), Join("search/candidates/", index));
  Candidate candidate = MaximizeImprovement(process, best, space, taken, seed);
  if (!candidate.found) candidate = FirstFree(space, taken);
  if (!candidate.found)
    return FailedPrecondition("search.trials is ", TrialCount(recipe), ", but there are no more different settings");
  v1::Trial trial = NewTrial(recipe, index, candidate.settings, "expected_improvement");
  trial.set_expected_improvement(std::exp(candidate.log_improvement) * scale.deviation);
  return trial;
}

}  // namespace

uint32_t TrialCount(const v1::Recipe& recipe) { return std::max<uint32_t>(1, recipe.search().trials()); }

bool CanSuggest(const v1::Recipe& recipe, const std::vector<v1::Trial>& trials, uint32_t index) {
  if (index >= TrialCount(recipe) || FindTrial(trials, index) != nullptr) return false;
  const uint32_t round = RoundStart(recipe.search(), index);
  for (uint32_t i = 0; i < index; ++i) {
    const v1::Trial* trial = FindTrial(trials, i);
    if (trial == nullptr || (i < round && !IsFinished(*trial))) return false;
  }
  return true;
}

StatusOr<v1::Trial> Suggest(const v1::Recipe& recipe, const std::vector<v1::Trial>& trials, uint32_t index) {
  if (!CanSuggest(recipe, trials, index))
    return FailedPrecondition("trial ", index,
                              " cannot be suggested now: it exists already, is past the last one, or trials "
                              "of earlier rounds are not finished");
  const Space space(recipe);
  if (recipe.search().trials() == 0 || space.Axes() == 0) return NewTrial(recipe, index, space.Base(), "recipe");
  if (index >= recipe.search().initial_trials()) return SuggestByModel(recipe, space, trials, index);

  const std::vector<v1::TrialSettings> initial = SobolSettings(recipe, space, index + 1, {});
  if (index < initial.size()) return NewTrial(recipe, index, initial[index], "sobol");
  std::vector<v1::TrialSettings> taken;
  for (const v1::Trial& trial : trials) taken.push_back(trial.settings());
  const Candidate rest = FirstFree(space, taken);
  if (!rest.found)
    return FailedPrecondition("search.trials is ", TrialCount(recipe), ", but there are no more different settings");
  return NewTrial(recipe, index, rest.settings, "sobol");
}

void Conclude(v1::Trial* trial) {
  std::vector<double> values;
  bool infeasible = trial->replicates().empty();
  for (const v1::Replicate& replicate : trial->replicates()) {
    if (!replicate.finished()) return;
    if (replicate.infeasible() || !std::isfinite(replicate.objective())) {
      infeasible = true;  // a setting of which some seeds diverge is not one to go on with
    } else {
      values.push_back(replicate.objective());
    }
  }
  const auto n = static_cast<double>(values.size());
  double mean = 0;
  for (double value : values) mean += value / n;
  double square = 0;
  for (double value : values) square += (value - mean) * (value - mean);
  trial->set_mean(mean);
  trial->set_standard_error(n < 2 ? 0 : std::sqrt(square / (n - 1) / n));
  if (trial->state() != v1::Trial::STOPPED_EARLY)
    trial->set_state(infeasible ? v1::Trial::INFEASIBLE : v1::Trial::SUCCEEDED);
}

std::vector<v1::StudyFinished::Best> SelectBest(const std::vector<v1::Trial>& trials) {
  std::map<std::string, const v1::Trial*> best;
  for (const v1::Trial& trial : trials) {
    if (trial.state() != v1::Trial::SUCCEEDED) continue;
    for (const std::string& selector : {std::string("best"), Join("best-", trial.settings().optimizer())}) {
      const v1::Trial*& held = best[selector];
      const bool better = held == nullptr || trial.mean() < held->mean() ||
                          (trial.mean() == held->mean() && trial.index() < held->index());
      if (better) held = &trial;
    }
  }
  std::vector<v1::StudyFinished::Best> result;
  for (const auto& [selector, trial] : best) {
    const v1::Replicate* chosen = nullptr;
    for (const v1::Replicate& replicate : trial->replicates()) {
      if (chosen == nullptr || replicate.objective() < chosen->objective() ||
          (replicate.objective() == chosen->objective() && replicate.index() < chosen->index()))
        chosen = &replicate;
    }
    v1::StudyFinished::Best item;
    item.set_selector(selector);
    item.set_trial(trial->index());
    item.set_replicate(chosen == nullptr ? 0 : chosen->index());
    result.push_back(std::move(item));
  }
  return result;
}

}  // namespace refinery::search
