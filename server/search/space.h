// server/search/space.h
//
// The search space of a recipe: trial settings <-> points in the unit cube. Every numeric parameter is one axis, linear
// or logarithmic; the optimizer is one categorical axis that holds the index of the choice.
//
// Numbers are rounded to four significant digits (ranks to whole numbers), so that a trial's settings can be written
// down and two settings that differ are visibly different.

#pragma once

#include <string>
#include <vector>

#include <Eigen/Core>

#include "refinery/v1/recipe.pb.h"
#include "refinery/v1/task.pb.h"

namespace refinery::search {

class Space {
 public:
  // `recipe` has its defaults filled in.
  explicit Space(const v1::Recipe& recipe);

  // Axes of a point; axis i is `parameters[i]` of the recipe.
  int Axes() const { return static_cast<int>(axes_.size()); }
  bool IsCategorical(int axis) const { return !axes_[axis].choices.empty(); }
  // The axis of the optimizer, or -1, and the number of its choices (1 without one).
  int CategoricalAxis() const { return categorical_axis_; }
  int Choices() const;
  // How many different settings there are; infinite with a continuous axis.
  double Size() const;

  // The settings at `uniform` (each coordinate in [0, 1), also for the categorical axis): the recipe's own for
  // everything that is not searched; for an optimizer that is not the recipe's, that optimizer's defaults.
  v1::TrialSettings Decode(const std::vector<double>& uniform) const;
  // The point of `settings`; of a categorical axis the index of the choice.
  Eigen::VectorXd Encode(const v1::TrialSettings& settings) const;

  // The recipe's own settings.
  v1::TrialSettings Base() const { return Settings(recipe_optimizer_); }

 private:
  struct Axis {
    std::string name;
    double low = 0;  // ends of the axis; logarithms of them on a logarithmic one
    double high = 1;
    double min = 0;  // of the values
    double max = 1;
    bool log = false;
    bool whole = false;
    std::vector<std::string> choices;
  };

  v1::TrialSettings Settings(const std::string& optimizer) const;

  v1::Distill distill_;
  std::string recipe_optimizer_;
  std::vector<Axis> axes_;
  int categorical_axis_ = -1;
};

// Whether two settings are the same point.
bool SameSettings(const v1::TrialSettings& a, const v1::TrialSettings& b);

}  // namespace refinery::search
