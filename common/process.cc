#include "common/process.h"

#include <fcntl.h>
#include <signal.h>
#include <spawn.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <sstream>
#include <thread>

#include "common/files.h"

extern char** environ;

namespace refinery {
namespace {

constexpr std::chrono::milliseconds kPollInterval{20};

// Our environment with `added` put over it, in the form of environ.
class Environment {
 public:
  explicit Environment(const std::map<std::string, std::string>& added) {
    for (char** entry = environ; *entry != nullptr; ++entry) {
      std::string text = *entry;
      if (added.count(text.substr(0, text.find('='))) == 0) texts_.push_back(std::move(text));
    }
    for (const auto& [name, value] : added) texts_.push_back(Join(name, "=", value));
    for (std::string& text : texts_) pointers_.push_back(text.data());
    pointers_.push_back(nullptr);
  }
  char** get() { return pointers_.data(); }

 private:
  std::vector<std::string> texts_;
  std::vector<char*> pointers_;
};

// posix_spawn's two settings objects, freed on scope exit.
struct SpawnSettings {
  SpawnSettings() {
    posix_spawn_file_actions_init(&actions);
    posix_spawnattr_init(&attributes);
  }
  ~SpawnSettings() {
    posix_spawn_file_actions_destroy(&actions);
    posix_spawnattr_destroy(&attributes);
  }
  SpawnSettings(const SpawnSettings&) = delete;
  SpawnSettings& operator=(const SpawnSettings&) = delete;
  posix_spawn_file_actions_t actions;
  posix_spawnattr_t attributes;
};

// A group or session of its own, no blocked or ignored signals.
void SetAttributes(posix_spawnattr_t* attributes, bool new_session) {
  sigset_t none;
  sigemptyset(&none);
  sigset_t all;
  sigfillset(&all);
  posix_spawnattr_setsigmask(attributes, &none);
  posix_spawnattr_setsigdefault(attributes, &all);
  posix_spawnattr_setpgroup(attributes, 0);
  int16_t flags = POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF;
  flags |= new_session ? POSIX_SPAWN_SETSID : POSIX_SPAWN_SETPGROUP;
  posix_spawnattr_setflags(attributes, flags);
}

}  // namespace

StatusOr<std::unique_ptr<Process>> Process::Start(const ProcessOptions& options) {
  RF_CHECK(!options.command.empty());
  const std::string& program = options.command[0];
  if (::access(program.c_str(), X_OK) != 0)
    return NotFound("cannot run ", program, ": ", std::strerror(errno));
  SpawnSettings settings;
  SetAttributes(&settings.attributes, options.new_session);
  posix_spawn_file_actions_addopen(&settings.actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
  int out[2] = {-1, -1};
  int err[2] = {-1, -1};
  auto close_all = [&] {
    for (int fd : {out[0], out[1], err[0], err[1]}) {
      if (fd >= 0) ::close(fd);
    }
  };
  if (options.pipes) {
    if (::pipe2(out, O_CLOEXEC) != 0 || ::pipe2(err, O_CLOEXEC) != 0) {
      close_all();
      return Unavailable("cannot make a pipe: ", std::strerror(errno));
    }
    posix_spawn_file_actions_adddup2(&settings.actions, out[1], STDOUT_FILENO);
    posix_spawn_file_actions_adddup2(&settings.actions, err[1], STDERR_FILENO);
  } else {
    posix_spawn_file_actions_addopen(&settings.actions, STDOUT_FILENO, options.log.c_str(),
                                     O_WRONLY | O_CREAT | O_APPEND, 0644);
    posix_spawn_file_actions_adddup2(&settings.actions, STDOUT_FILENO, STDERR_FILENO);
  }
  posix_spawn_file_actions_addclosefrom_np(&settings.actions, STDERR_FILENO + 1);
  std::vector<char*> arguments;
  for (const std::string& argument : options.command) arguments.push_back(const_cast<char*>(argument.c_str()));
  arguments.push_back(nullptr);
  Environment environment(options.environment);
  pid_t pid = -1;
  int error = ::posix_spawn(&pid, program.c_str(), &settings.actions, &settings.attributes, arguments.data(),
                            environment.get());
  if (error != 0) {
    close_all();
    return Unavailable("cannot start ", program, ": ", std::strerror(error));
  }
  if (options.pipes) {
    ::close(out[1]);
    ::close(err[1]);
  }
  std::unique_ptr<Process> process(new Process());
  process->pid_ = pid;
  process->stdout_fd_ = out[0];
  process->stderr_fd_ = err[0];
  process->own_session_ = options.new_session;
  return process;
}

Process::~Process() {
  if (!exit_.has_value() && !own_session_) {
    Signal(SIGKILL);
    Wait();
  }
  if (stdout_fd_ >= 0) ::close(stdout_fd_);
  if (stderr_fd_ >= 0) ::close(stderr_fd_);
}

std::optional<ExitInfo> Process::WaitWith(int flags) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (exit_.has_value()) return exit_;
  int status = 0;
  struct rusage usage {};
  pid_t result;
  do {
    result = ::wait4(pid_, &status, flags, &usage);
  } while (result < 0 && errno == EINTR);
  if (result == 0) return std::nullopt;
  ExitInfo info;
  if (result > 0) {
    if (WIFEXITED(status)) info.code = WEXITSTATUS(status);
    if (WIFSIGNALED(status)) info.signal = WTERMSIG(status);
    info.peak_memory_bytes = static_cast<uint64_t>(usage.ru_maxrss) * 1024;
    auto seconds = [](const timeval& time) {
      return static_cast<double>(time.tv_sec) + static_cast<double>(time.tv_usec) * 1e-6;
    };
    info.cpu_seconds = seconds(usage.ru_utime) + seconds(usage.ru_stime);
  }
  exit_ = info;
  return exit_;
}

ExitInfo Process::Wait() {
  // Not a blocking wait4: the mutex must be free for Signal() meanwhile. WNOWAIT leaves the process to be reaped below.
  siginfo_t info;
  while (::waitid(P_PID, static_cast<id_t>(pid_), &info, WEXITED | WNOWAIT) != 0 && errno == EINTR) {
  }
  return *WaitWith(0);
}

bool Process::Ended() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (exit_.has_value()) return true;
  siginfo_t info{};
  return ::waitid(P_PID, static_cast<id_t>(pid_), &info, WEXITED | WNOWAIT | WNOHANG) != 0 || info.si_pid == pid_;
}

std::optional<ExitInfo> Process::TryWait() { return WaitWith(WNOHANG); }

void Process::Signal(int signal) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (!exit_.has_value()) ::kill(-pid_, signal);
}

std::filesystem::path ProgramFolder() {
  std::error_code error;
  return std::filesystem::read_symlink("/proc/self/exe", error).parent_path();
}

uint64_t ProcessStartTime(pid_t pid) {
  std::ifstream file(Join("/proc/", pid, "/stat"));
  std::stringstream text;
  text << file.rdbuf();
  std::string stat = text.str();
  size_t after_name = stat.rfind(')');   // the name may hold spaces and parentheses
  if (after_name == std::string::npos) return 0;
  std::istringstream fields(stat.substr(after_name + 1));
  std::string field;
  fields >> field;
  if (field == "Z") return 0;            // dead, only not reaped
  for (int i = 4; i <= 22; ++i) fields >> field;   // starttime is field 22
  return std::strtoull(field.c_str(), nullptr, 10);
}

bool StopProcess(pid_t pid, uint64_t start_time, std::chrono::milliseconds grace) {
  auto gone = [&] {
    ::waitpid(pid, nullptr, WNOHANG);    // reaps it if it is our child
    return start_time == 0 || ProcessStartTime(pid) != start_time;
  };
  for (int signal : {SIGTERM, SIGKILL}) {
    if (gone()) return true;
    ::kill(pid, signal);
    auto deadline = std::chrono::steady_clock::now() + grace;
    while (std::chrono::steady_clock::now() < deadline) {
      if (gone()) return true;
      std::this_thread::sleep_for(kPollInterval);
    }
  }
  return gone();
}

}  // namespace refinery
