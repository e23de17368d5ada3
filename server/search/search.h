// server/search/search.h
//
// Bayesian search over trial settings: scrambled Sobol points first, then a Gaussian process (Matern 5/2,
// replicate-aware noise) with expected improvement. Pure and deterministic: (recipe, seed, finished trials) ->
// settings. A study that is replayed suggests the same trials.
//
// Objective: validation loss in nats per token, smaller is better. A trial that diverged is INFEASIBLE and is warped to
// the worst finite value.

#pragma once

#include <cstdint>
#include <vector>

#include "common/status.h"
#include "refinery/v1/events.pb.h"
#include "refinery/v1/recipe.pb.h"
#include "refinery/v1/study.pb.h"

namespace refinery::search {

// Trials of the study: search.trials, or 1 when there is no search.
uint32_t TrialCount(const v1::Recipe& recipe);

// Whether trial `index` may be suggested now: trials are suggested in rounds of search.parallel (the Sobol trials are
// one round), and a round starts when every trial of the rounds before it has finished. So the suggestion does not
// depend on the order in which workers finish.
bool CanSuggest(const v1::Recipe& recipe, const std::vector<v1::Trial>& trials, uint32_t index);

// The settings of trial `index`, state ACTIVE, with search.replicates unfinished replicates.
StatusOr<v1::Trial> Suggest(const v1::Recipe& recipe, const std::vector<v1::Trial>& trials, uint32_t index);

// Mean, standard error and state of a trial whose replicates have all finished.
void Conclude(v1::Trial* trial);

// For "best" and each optimizer that was tried ("best-muon", "best-adamw"): the trial with the lowest mean objective
// and in it the replicate with the lowest objective; ties go to the lower index. A selector without a feasible trial is
// left out.
std::vector<v1::StudyFinished::Best> SelectBest(const std::vector<v1::Trial>& trials);

}  // namespace refinery::search
