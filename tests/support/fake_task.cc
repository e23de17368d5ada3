// tests/support/fake_task.cc
//
// Stands in for refinery-task in tests of the agent: takes the same flags, prints the same events, and does what the uri of
// its import_model parameters says, e.g. "succeed", "crash:11", "error:USER:no such model", "sleep:60", "checkpoint:2".
// With inputs it copies each input's files into its outputs, so that a test sees what arrived.

#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <map>
#include <sstream>
#include <string>
#include <thread>

#include <nlohmann/json.hpp>

namespace {

namespace fs = std::filesystem;

void WriteText(const fs::path& path, const std::string& text) {
  fs::create_directories(path.parent_path());
  std::ofstream(path) << text;
}

std::string ReadText(const fs::path& path) {
  std::stringstream text;
  text << std::ifstream(path).rdbuf();
  return text.str();
}

void Event(const nlohmann::json& event) { std::cout << event.dump() << std::endl; }

void CopyInputs(const fs::path& inputs, const fs::path& outputs) {
  for (const auto& input : fs::directory_iterator(inputs)) {
    for (const auto& file : fs::directory_iterator(input.path())) {
      WriteText(outputs / input.path().filename() / file.path().filename(), ReadText(file.path()));
    }
  }
}

// "checkpoint:N": on its first run makes N checkpoints and then fails; when it resumes it succeeds.
int RunCheckpoints(int count, std::map<std::string, std::string>& flags) {
  if (flags.count("--resume") > 0) {
    WriteText(fs::path(flags["--outputs"]) / "resumed.txt", ReadText(fs::path(flags["--resume"]) / "state.txt"));
    return 0;
  }
  for (int i = 1; i <= count; ++i) {
    std::string name = "step-" + std::to_string(i);
    WriteText(fs::path(flags["--checkpoints"]) / name / "state.txt", "state after " + std::to_string(i));
    Event({{"checkpoint", {{"name", name}, {"step", std::to_string(i)}}}});
  }
  Event({{"error", {{"failureClass", "INFRA"}, {"code", 14}, {"message", "first run ends here"}}}});
  return 1;
}

int Succeed(std::map<std::string, std::string>& flags, const nlohmann::json& spec) {
  std::cerr << "a log line\n" << "threads " << std::getenv("OMP_NUM_THREADS") << "\n";
  std::cout << "not an event\n";
  if (const char* rank = std::getenv("RANK")) {
    std::cerr << "rank " << rank << " of " << std::getenv("WORLD_SIZE") << " meets at " << std::getenv("MASTER_ADDR") << ":"
              << std::getenv("MASTER_PORT") << "\n";
  }
  Event({{"progress", {{"phase", "training"}, {"done", 1}, {"total", 2}, {"tokensTrained", "123"}}}});
  Event({{"measurement", {{"name", "validation_loss"}, {"value", 1.5}, {"count", "7"}}}});
  Event({{"note", {{"code", "damping_raised"}, {"text", "layer 3"}}}});
  WriteText(fs::path(flags["--outputs"]) / "result.txt", "done " + spec.value("path", ""));
  CopyInputs(flags["--inputs"], flags["--outputs"]);
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  std::map<std::string, std::string> flags;
  for (int i = 1; i + 1 < argc; i += 2) flags[argv[i]] = argv[i + 1];
  if (flags.count("--spec") == 0) return 2;
  prctl(PR_SET_PDEATHSIG, SIGKILL);
  if (getppid() != std::atoi(flags["--parent-pid"].c_str())) return 1;
  nlohmann::json spec = nlohmann::json::parse(ReadText(flags["--spec"]));
  std::stringstream uri(spec.value("importModel", nlohmann::json::object()).value("uri", "succeed"));
  std::string verb, first, second;
  std::getline(uri, verb, ':');
  std::getline(uri, first, ':');
  std::getline(uri, second);
  if (verb == "crash") {
    std::cerr << "about to crash" << std::endl;
    signal(std::atoi(first.c_str()), SIG_DFL);
    raise(std::atoi(first.c_str()));
  }
  if (verb == "error") {
    Event({{"error", {{"failureClass", first}, {"code", 3}, {"message", second}}}});
    return 1;
  }
  if (verb == "silent") return 7;
  if (verb == "sleep") {
    Event({{"progress", {{"phase", "sleeping"}, {"done", 0}, {"total", 1}}}});
    WriteText(fs::path(flags["--cache"]) / "sleeping.pid", std::to_string(getpid()));
    std::this_thread::sleep_for(std::chrono::duration<double>(std::atof(first.c_str())));
  }
  if (verb == "stubborn") {
    signal(SIGTERM, SIG_IGN);
    WriteText(fs::path(flags["--cache"]) / "sleeping.pid", std::to_string(getpid()));
    std::this_thread::sleep_for(std::chrono::seconds(60));
  }
  if (verb == "checkpoint") return RunCheckpoints(std::atoi(first.c_str()), flags);
  return Succeed(flags, spec);
}
