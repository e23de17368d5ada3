#include "worker/agent/task_process.h"

#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <fstream>

#include <google/protobuf/util/json_util.h>

namespace refinery::agent {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kMaxLineBytes = 1 << 20;
constexpr int kPollMs = 100;
constexpr std::chrono::seconds kDrainPipes{2};   // after its end, should a grandchild still hold them

// Cuts what is read from a pipe into lines.
class LineReader {
 public:
  explicit LineReader(int fd) : fd_(fd) {}
  bool open() const { return open_; }
  int fd() const { return fd_; }

  // Reads once; calls `sink` for each whole line.
  void Read(const std::function<void(std::string_view)>& sink) {
    std::array<char, 16384> buffer;
    ssize_t got = ::read(fd_, buffer.data(), buffer.size());
    if (got < 0 && (errno == EINTR || errno == EAGAIN)) return;
    if (got <= 0) {
      open_ = false;
      if (!line_.empty()) sink(line_);
      line_.clear();
      return;
    }
    std::string_view bytes(buffer.data(), static_cast<size_t>(got));
    while (!bytes.empty()) {
      size_t end = bytes.find('\n');
      std::string_view part = bytes.substr(0, end);
      if (line_.size() + part.size() <= kMaxLineBytes) line_ += part;
      if (end == std::string_view::npos) return;
      sink(line_);
      line_.clear();
      bytes.remove_prefix(end + 1);
    }
  }

 private:
  int fd_;
  bool open_ = true;
  std::string line_;
};

bool ParseEvent(std::string_view line, v1::TaskEvent* event) {
  google::protobuf::util::JsonParseOptions options;
  options.ignore_unknown_fields = true;
  google::protobuf::StringPiece text(line.data(), line.size());
  return google::protobuf::util::JsonStringToMessage(text, event, options).ok() &&
         event->kind_case() != v1::TaskEvent::KIND_NOT_SET;
}

std::vector<std::string> Arguments(const TaskCommand& command) {
  std::vector<std::string> arguments = {command.program.string(), "--spec", command.spec.string(),
                                        "--inputs", command.inputs.string(), "--outputs", command.outputs.string(),
                                        "--checkpoints", command.checkpoints.string(),
                                        "--cache", command.cache.string(),
                                        "--parent-pid", std::to_string(::getpid())};
  if (!command.resume.empty()) arguments.insert(arguments.end(), {"--resume", command.resume.string()});
  return arguments;
}

}  // namespace

StatusOr<ExitInfo> TaskProcess::Run(const TaskCommand& command, const EventSink& on_event, const LogSink& on_log) {
  ProcessOptions options;
  options.command = Arguments(command);
  // Threads that spin while they wait would slow their neighbours on the same cores by a factor of four.
  options.environment = command.environment;
  options.environment.insert({{"OMP_WAIT_POLICY", "PASSIVE"}, {"OMP_NUM_THREADS", std::to_string(command.threads)}});
  RF_ASSIGN_OR_RETURN(std::unique_ptr<Process> process, Process::Start(options));
  Pump(*process, on_event, on_log);
  return process->Wait();
}

void TaskProcess::Pump(Process& process, const EventSink& on_event, const LogSink& on_log) {
  LineReader out(process.stdout_fd());
  LineReader err(process.stderr_fd());
  auto on_line = [&](std::string_view line) {
    v1::TaskEvent event;
    if (ParseEvent(line, &event)) {
      on_event(event);
    } else if (!line.empty()) {
      on_log(line);   // something that a library printed
    }
  };
  Clock::time_point give_up = Clock::time_point::max();
  while ((out.open() || err.open()) && Clock::now() < give_up) {
    std::array<pollfd, 2> fds = {pollfd{out.open() ? out.fd() : -1, POLLIN, 0},
                                 pollfd{err.open() ? err.fd() : -1, POLLIN, 0}};
    int ready = ::poll(fds.data(), fds.size(), kPollMs);
    if (ready > 0 && fds[0].revents != 0) out.Read(on_line);
    if (ready > 0 && fds[1].revents != 0) err.Read(on_log);
    SignalWhenStopped(process);
    if (give_up == Clock::time_point::max() && process.Ended()) {
      process.Signal(SIGKILL);   // what it left behind in its group
      give_up = Clock::now() + kDrainPipes;
    }
  }
  while (!process.Ended()) {     // it closed its pipes and goes on
    SignalWhenStopped(process);
    ::poll(nullptr, 0, kPollMs / 10);
  }
  process.Signal(SIGKILL);
}

void TaskProcess::SignalWhenStopped(Process& process) {
  int64_t grace_ms = stop_grace_ms_.load();
  if (grace_ms < 0 || killed_) return;
  if (!terminated_) {
    terminated_ = true;
    kill_time_ = Clock::now() + std::chrono::milliseconds(grace_ms);
    process.Signal(SIGTERM);
  }
  if (Clock::now() >= kill_time_) {
    killed_ = true;
    process.Signal(SIGKILL);
  }
}

void TaskProcess::Stop(std::chrono::milliseconds grace) {
  int64_t expected = -1;
  stop_grace_ms_.compare_exchange_strong(expected, grace.count());
}

uint64_t OutOfMemoryKills() {
  std::ifstream file("/proc/vmstat");
  std::string name;
  uint64_t value = 0;
  while (file >> name >> value) {
    if (name == "oom_kill") return value;
  }
  return 0;
}

}  // namespace refinery::agent
