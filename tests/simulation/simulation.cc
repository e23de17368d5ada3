// Simulate, Shrink and the texts of tests/simulation/options.h.

#include <algorithm>
#include <numeric>

#include "common/status.h"
#include "tests/simulation/options.h"
#include "tests/simulation/world.h"

namespace refinery::simulation {
namespace {

constexpr const char* kFaultNames[] = {"coordinator crash", "coordinator pause", "worker crash",   "worker pause", "partition",
                                       "message loss",      "message duplication", "message delay", "clock jump",   "slow disk",
                                       "full disk",         "task failure",        "task hang",     "user action",  "blob loss"};

// Digits and names of jobs and workers say where it broke, not what.
std::string Kind(const std::string& failure) {
  std::string kind;
  for (const char c : failure) {
    if (c < '0' || c > '9') kind += c;
  }
  return kind.substr(0, 24);
}

bool FailsAlike(const SimulationOptions& options, const Result& failed, Result* result) {
  *result = Simulate(options);
  return !result->ok && Kind(result->failure) == Kind(failed.failure);
}

}  // namespace

std::string FaultName(uint32_t kind) {
  for (size_t i = 0; i < std::size(kFaultNames); ++i) {
    if (kind == 1u << i) return kFaultNames[i];
  }
  return "none";
}

Result Simulate(const SimulationOptions& options) { return World(options).Run(); }

SimulationOptions Shrink(const SimulationOptions& options, const Result& failed) {
  SimulationOptions best = options;
  Result result;
  const auto attempt = [&](const SimulationOptions& smaller) {
    if (!FailsAlike(smaller, failed, &result)) return false;
    best = smaller;
    return true;
  };
  for (uint32_t kind = 1; kind < kAllFaults; kind <<= 1) {
    SimulationOptions smaller = best;
    smaller.faults = best.faults & ~kind;
    attempt(smaller);
  }
  for (int jobs = 1; jobs < failed.used_jobs; ++jobs) {
    SimulationOptions smaller = best;
    smaller.jobs = jobs;
    if (attempt(smaller)) break;
  }
  for (int workers = 1; workers < failed.used_workers; ++workers) {
    SimulationOptions smaller = best;
    smaller.workers = workers;
    if (attempt(smaller)) break;
  }
  SimulationOptions none = best;
  none.no_planned_faults = true;
  if (attempt(none)) return best;
  // Bisection of the list: without halves, quarters, ... and single faults.
  std::vector<int> faults(static_cast<size_t>(failed.planned_faults));
  std::iota(faults.begin(), faults.end(), 0);
  for (size_t part = std::max<size_t>(1, faults.size() / 2); part > 0; part /= 2) {
    for (size_t at = 0; at < faults.size() && faults.size() > 1;) {
      std::vector<int> fewer(faults.begin(), faults.begin() + static_cast<ptrdiff_t>(at));
      fewer.insert(fewer.end(), faults.begin() + static_cast<ptrdiff_t>(std::min(at + part, faults.size())), faults.end());
      SimulationOptions smaller = best;
      smaller.only_faults = fewer;
      if (!fewer.empty() && attempt(smaller)) {
        faults = fewer;
      } else {
        at += part;
      }
    }
  }
  return best;
}

std::string CommandOf(const SimulationOptions& options) {
  std::string command = Join("refinery_simulation --seeds ", options.seed, "..", options.seed);
  if (options.jobs > 0) command += Join(" --jobs ", options.jobs);
  if (options.workers > 0) command += Join(" --workers ", options.workers);
  if (options.faults != kAllFaults) command += Join(" --kinds ", options.faults);
  if (options.no_planned_faults) command += " --no-planned-faults";
  if (options.hours > 0) command += Join(" --hours ", options.hours, " --faults-per-hour ", options.faults_per_hour, " --shards ", options.shards);
  if (!options.only_faults.empty()) {
    command += " --only";
    for (size_t i = 0; i < options.only_faults.size(); ++i) command += Join(i == 0 ? " " : ",", options.only_faults[i]);
  }
  const Mutations& mutations = options.mutations;
  if (mutations.core.ignore_epoch) command += " --mutate ignore_epoch";
  if (mutations.core.no_grace) command += " --mutate no_grace";
  if (mutations.core.ignore_losses) command += " --mutate ignore_losses";
  if (mutations.commit_before_blob) command += " --mutate commit_before_blob";
  if (mutations.reply_before_append) command += " --mutate reply_before_append";
  if (mutations.no_fence) command += " --mutate no_fence";
  return command;
}

}  // namespace refinery::simulation
