// refinery_simulation: runs of the coordinator's real core and scheduler under simulated faults.
//
//   refinery_simulation --seeds 1..100000                              many short runs
//   refinery_simulation --hours 24 --workers 1000 --faults-per-hour 0.01   a fleet over a day
//
// A run that breaks an invariant is shrunk and printed with the command that repeats it; the exit code is then 1.

#include <CLI/CLI.hpp>
#include <chrono>
#include <iostream>

#include "common/status.h"
#include "tests/simulation/options.h"

namespace refinery::simulation {
namespace {

void PrintLong(const Result& result) {
  std::cout << "simulated " << static_cast<double>(result.time) / 3.6e6 << " h: " << result.jobs << " jobs ended, "
            << result.succeeded << " of them well; " << result.attempts << " attempts, " << result.events << " events, "
            << result.faults << " planned faults, " << result.restarts << " starts of the coordinator\n"
            << "late commits of stale epochs: " << result.late_commits << ", refused: " << result.late_commits_refused << "\n";
}

void Add(const Result& result, Result* total) {
  total->time += result.time;
  total->events += result.events;
  total->jobs += result.jobs;
  total->succeeded += result.succeeded;
  total->attempts += result.attempts;
  total->faults += result.faults;
  total->restarts += result.restarts;
  total->late_commits += result.late_commits;
  total->late_commits_refused += result.late_commits_refused;
}

void SetMutation(const std::string& name, Mutations* mutations) {
  mutations->core.ignore_epoch |= name == "ignore_epoch";
  mutations->core.no_grace |= name == "no_grace";
  mutations->core.ignore_losses |= name == "ignore_losses";
  mutations->commit_before_blob |= name == "commit_before_blob";
  mutations->reply_before_append |= name == "reply_before_append";
  mutations->no_fence |= name == "no_fence";
}

int Main(int argc, char** argv) {
  CLI::App app("Simulated runs of the coordinator's core.");
  SimulationOptions options;
  std::string seeds = "1..300", only, mutation;
  app.add_option("--seeds", seeds, "A..B");
  app.add_option("--jobs", options.jobs, "0 = by the seed");
  app.add_option("--workers", options.workers, "0 = by the seed");
  app.add_option("--kinds", options.faults, "bits of the kinds of faults that may happen");
  app.add_option("--only", only, "positions of the planned faults that happen, A,B,C");
  app.add_flag("--no-planned-faults", options.no_planned_faults);
  app.add_option("--hours", options.hours, "simulate one long run of so many hours");
  app.add_option("--faults-per-hour", options.faults_per_hour, "of each worker, in the long run");
  app.add_option("--shards", options.shards, "tasks of the widest stage of a job of the long run");
  app.add_option("--mutate", mutation, "plant a bug: ignore_epoch no_grace ignore_losses commit_before_blob reply_before_append no_fence");
  app.add_flag("--verbose", options.verbose);
  CLI11_PARSE(app, argc, argv);
  for (size_t at = 0; at < only.size();) {
    options.only_faults.push_back(std::stoi(only.substr(at)));
    const size_t comma = only.find(',', at);
    at = comma == std::string::npos ? only.size() : comma + 1;
  }
  SetMutation(mutation, &options.mutations);
  const size_t dots = seeds.find("..");
  const uint64_t first = std::stoull(seeds);
  const uint64_t last = options.hours > 0 ? first : dots == std::string::npos ? first : std::stoull(seeds.substr(dots + 2));

  Result total;
  const auto start = std::chrono::steady_clock::now();
  for (options.seed = first; options.seed <= last; ++options.seed) {
    const Result result = Simulate(options);
    Add(result, &total);
    if (result.ok) continue;
    std::cout << "seed " << options.seed << " at " << result.time << " ms: " << result.failure << "\n";
    std::cout << "repeat it: " << CommandOf(options) << "\n";
    if (options.hours == 0) std::cout << "smaller:   " << CommandOf(Shrink(options, result)) << "\n";
    return 1;
  }
  PrintLong(total);
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::cout << "no invariant broken in " << last - first + 1 << " runs, " << seconds << " s\n";
  return 0;
}

}  // namespace
}  // namespace refinery::simulation

int main(int argc, char** argv) try {
  return refinery::simulation::Main(argc, argv);
} catch (const std::exception& e) {  // numbers that are none
  std::cerr << e.what() << "\n";
  return 2;
}
