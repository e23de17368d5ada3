// Runs a fuzz target over its corpus without libFuzzer: the inputs of mutate.cc, then the files of corpus/<format>/. Every input
// must come back, whatever it says: each has kSeconds of processor time, and the sanitizer ends the program at a memory error and
// at its memory limits. The input that ended it is written to a file, which can be given as an argument to try again.
//
//   <format>_fuzz_replay                 all inputs
//   <format>_fuzz_replay FILE...         these files
//   <format>_fuzz_replay --write FOLDER  writes the inputs (a first corpus for libFuzzer)

#include <signal.h>
#include <sys/resource.h>
#include <sys/time.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "common/files.h"
#include "tests/fuzz/fuzz_target.h"

// Memory: no block above 4 GiB (reserved), no more than 2 GiB in all (used). LibTorch is not instrumented and keeps what it once allocated.
extern "C" const char* __asan_default_options() {
  return "detect_leaks=0:quarantine_size_mb=16:hard_rss_limit_mb=2048:max_allocation_size_mb=4096:allocator_may_return_null=0:"
         "detect_odr_violation=0:handle_abort=1";
}
extern "C" const char* __ubsan_default_options() { return "print_stacktrace=1"; }
extern "C" void __sanitizer_set_death_callback(void (*callback)()) __attribute__((weak));

namespace refinery::fuzz {
namespace {

constexpr int kSeconds = 5;
constexpr int kWallSeconds = 60;   // for what waits instead of working
constexpr size_t kFewestInputs = 200;

const Input* running = nullptr;

// Only calls that are safe in a signal handler.
void SaveRunning() {
  if (running == nullptr) return;
  char path[256];
  std::snprintf(path, sizeof(path), "/tmp/%s-%d.fuzz", kFormat, static_cast<int>(getpid()));
  if (FILE* file = std::fopen(path, "wb")) {
    std::fwrite(running->bytes.data(), 1, running->bytes.size(), file);
    std::fclose(file);
  }
  std::fprintf(stderr, "%s: the input \"%s\" ended the program; it is in %s\n", kFormat, running->name.c_str(), path);
}

void OnTime(int) {
  std::fprintf(stderr, "%s: more than %d seconds of work\n", kFormat, kSeconds);
  SaveRunning();
  std::abort();
}

void Arm(int work_seconds, int wall_seconds) {
  itimerval timer{};
  timer.it_value.tv_sec = work_seconds;
  setitimer(ITIMER_PROF, &timer, nullptr);
  alarm(static_cast<unsigned>(wall_seconds));
}

double RunOne(const Input& input) {
  running = &input;
  Arm(kSeconds, kWallSeconds);
  const auto start = std::chrono::steady_clock::now();
  // A copy of exactly its size: reading past its end is an error that the sanitizer sees.
  std::vector<uint8_t> bytes(input.bytes.begin(), input.bytes.end());
  bytes.shrink_to_fit();
  LLVMFuzzerTestOneInput(bytes.data(), bytes.size());
  const double ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  Arm(0, 0);
  running = nullptr;
  return ms;
}

std::vector<Input> FromFiles(const std::vector<std::filesystem::path>& files) {
  std::vector<Input> inputs;
  for (const auto& file : files) {
    auto bytes = ReadFile(file);
    if (!bytes.ok()) {
      std::fprintf(stderr, "%s\n", Message(bytes.status()).c_str());
      std::exit(2);
    }
    inputs.push_back({file.string(), *bytes});
  }
  return inputs;
}

std::vector<Input> WholeCorpus() {
  std::vector<Input> inputs = MakeInputs(Seeds(), kTextKind);
  std::vector<std::filesystem::path> files;
  const std::filesystem::path folder = std::filesystem::path(REFINERY_SOURCE_DIR) / "tests/fuzz/corpus" / kFormat;
  if (std::filesystem::is_directory(folder))
    for (const auto& entry : std::filesystem::directory_iterator(folder)) files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  for (Input& input : FromFiles(files)) inputs.push_back(std::move(input));
  return inputs;
}

int Write(const std::filesystem::path& folder) {
  size_t number = 0;
  for (const Input& input : WholeCorpus())
    if (!WriteFileAtomically(folder / Join(number++, ".bin"), input.bytes).ok()) return 2;
  return 0;
}

int Main(int argc, char** argv) {
  if (argc == 3 && std::strcmp(argv[1], "--write") == 0) return Write(argv[2]);
  signal(SIGPROF, OnTime);
  signal(SIGALRM, OnTime);
  if (__sanitizer_set_death_callback != nullptr) __sanitizer_set_death_callback(SaveRunning);
  const bool is_whole = argc == 1;
  const std::vector<Input> inputs = is_whole ? WholeCorpus() : FromFiles({argv + 1, argv + argc});
  double slowest = 0;
  std::string slowest_name;
  for (const Input& input : inputs) {
    const double ms = RunOne(input);
    if (ms > slowest) slowest_name = input.name;
    slowest = std::max(slowest, ms);
  }
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  std::printf("%s: %zu inputs, %zu read, %zu refused; slowest %.0f ms (%s); peak memory %ld MiB\n", kFormat, inputs.size(),
              inputs_read, inputs.size() - inputs_read, slowest, slowest_name.c_str(), usage.ru_maxrss / 1024);
  std::filesystem::remove_all(InputFolder());
  // A target that refuses everything would test nothing behind its first check.
  if (is_whole && (inputs.size() < kFewestInputs || inputs_read < Seeds().size())) {
    std::fprintf(stderr, "%s: fewer than %zu inputs, or fewer read than there are seeds\n", kFormat, kFewestInputs);
    return 1;
  }
  return 0;
}

}  // namespace
}  // namespace refinery::fuzz

int main(int argc, char** argv) { return refinery::fuzz::Main(argc, argv); }
