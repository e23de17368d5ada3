// server/search/acquisition.h
//
// Log expected improvement and its maximisation over the search space. Smaller objectives are better.
//
// Source: Ament et al. 2023, "Unexpected Improvements to Expected Improvement for Bayesian Optimization"
// (arXiv:2310.20708).

#pragma once

#include <cstdint>
#include <vector>

#include "server/search/gaussian_process.h"
#include "server/search/space.h"

namespace refinery::search {

// log(phi(z) + z * Phi(z)), the log of the expected value of max(0, z + N(0, 1)). Accurate where that underflows (z to
// -1e8).
double LogExpectedPositivePart(double z);

// log E[max(0, best - f)] for f ~ N(mean, variance).
double LogExpectedImprovement(double mean, double variance, double best);

// The lowest posterior mean at the observed points: the plug-in for the unknown best value under noise.
double Incumbent(const GaussianProcess& process);

struct Candidate {
  v1::TrialSettings settings;
  double log_improvement = 0;
  bool found = false;  // false: every setting that was looked at is among `taken`
};

// The settings with the highest log expected improvement that are not among `taken`: scrambled Sobol candidates for
// every choice of the categorical axis, the best of them and the incumbent refined by a local search (NLopt's Subplex).
Candidate MaximizeImprovement(const GaussianProcess& process, double best, const Space& space,
                              const std::vector<v1::TrialSettings>& taken, uint64_t seed);

}  // namespace refinery::search
