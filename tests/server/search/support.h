// Recipes and trials for the tests of the search.

#pragma once

#include <string>
#include <vector>

#include "common/recipe.h"
#include "refinery/v1/recipe.pb.h"
#include "refinery/v1/study.pb.h"
#include "server/search/search.h"

namespace refinery::search {

inline v1::Parameter* AddParameter(v1::Recipe* recipe, const std::string& name, double min, double max,
                                   bool log = false) {
  v1::Parameter* parameter = recipe->mutable_search()->add_parameters();
  parameter->set_name(name);
  parameter->set_min(min);
  parameter->set_max(max);
  parameter->set_log(log);
  return parameter;
}

inline void AddOptimizers(v1::Recipe* recipe) {
  v1::Parameter* parameter = recipe->mutable_search()->add_parameters();
  parameter->set_name("optimizer");
  parameter->add_choices("muon");
  parameter->add_choices("adamw");
}

// Optimizer, learning rate and temperature, as in the demo.
inline v1::Recipe DemoSearch(uint64_t seed, uint32_t trials = 8, uint32_t initial = 4) {
  v1::Recipe recipe;
  recipe.set_seed(seed);
  recipe.mutable_search()->set_trials(trials);
  recipe.mutable_search()->set_initial_trials(initial);
  recipe.mutable_search()->set_replicates(2);
  AddOptimizers(&recipe);
  AddParameter(&recipe, "learning_rate", 1e-4, 1e-2, true);
  AddParameter(&recipe, "temperature", 1, 4);
  FillDefaults(&recipe);
  return recipe;
}

// Ends every replicate of `trial` with the given objectives (NaN: infeasible).
inline void Finish(v1::Trial* trial, const std::vector<double>& objectives) {
  trial->clear_replicates();
  for (size_t i = 0; i < objectives.size(); ++i) {
    v1::Replicate* replicate = trial->add_replicates();
    replicate->set_index(static_cast<uint32_t>(i));
    replicate->set_finished(true);
    replicate->set_infeasible(objectives[i] != objectives[i]);
    if (!replicate->infeasible()) replicate->set_objective(objectives[i]);
  }
  Conclude(trial);
}

}  // namespace refinery::search
