#include "client/local/local_programs.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <sys/file.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <thread>

#include <nlohmann/json.hpp>

#include "common/channel.h"
#include "common/files.h"

namespace refinery::client {
namespace {

using std::chrono::milliseconds;
using Json = nlohmann::json;

constexpr char kCoordinator[] = "refineryd";
constexpr char kWorker[] = "refinery-worker";
constexpr int kMaxRestarts = 5;
constexpr milliseconds kStartWait{20'000};
constexpr milliseconds kStopGrace{15'000};
constexpr size_t kTailLines = 8;
constexpr uint64_t kMaxRecordBytes = 1 << 20;
// One job on one's own disk: refineryd's marks keep room for a fleet's uploads and would refuse a laptop that has 15 GiB left.
constexpr char kDiskFullGib[] = "4";
constexpr char kDiskReadOnlyGib[] = "1";

// An exclusive lock on <state>/run.lock while programs are started or stopped.
class StateLock {
 public:
  explicit StateLock(const std::filesystem::path& state)
      : fd_(::open((state / "run.lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644)) {
    while (fd_ >= 0 && ::flock(fd_, LOCK_EX) != 0 && errno == EINTR) {
    }
  }
  ~StateLock() {
    if (fd_ >= 0) ::close(fd_);
  }
  StateLock(const StateLock&) = delete;
  StateLock& operator=(const StateLock&) = delete;

 private:
  int fd_;
};

// A loopback port that is free now.
StatusOr<std::string> FreeAddress() {
  int fd = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  bool ok = fd >= 0 && ::bind(fd, reinterpret_cast<sockaddr*>(&address), size) == 0 &&
            ::getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) == 0;
  int error = errno;
  if (fd >= 0) ::close(fd);
  if (!ok) return Unavailable("no free port on 127.0.0.1: ", std::strerror(error));
  return Join("127.0.0.1:", ntohs(address.sin_port));
}

}  // namespace

struct LocalPrograms::Record {
  std::string address;
  Program coordinator, worker;
  std::map<std::string, std::string> requests;
};

std::filesystem::path DefaultStateFolder(const std::string& recipe_name) {
  const char* base = std::getenv("XDG_STATE_HOME");
  if (base != nullptr && *base == '/') return std::filesystem::path(base) / "refinery" / recipe_name;
  const char* home = std::getenv("HOME");
  return std::filesystem::path(home == nullptr ? "." : home) / ".local/state/refinery" / recipe_name;
}

LocalPrograms::LocalPrograms(LocalOptions options) : options_(std::move(options)) {
  if (options_.programs.empty()) options_.programs = ProgramFolder();
}

LocalPrograms::~LocalPrograms() {
  if (users_fd_ >= 0) ::close(users_fd_);
}

StatusOr<std::unique_ptr<LocalPrograms>> LocalPrograms::Open(LocalOptions options) {
  std::unique_ptr<LocalPrograms> programs(new LocalPrograms(std::move(options)));
  LocalOptions& o = programs->options_;
  if (Status status = CreateFolders(o.state); !status.ok()) return FailedPrecondition(Message(status));
  std::error_code error;
  o.state = std::filesystem::absolute(o.state, error);
  for (const char* name : {kCoordinator, kWorker}) {
    if (::access((o.programs / name).c_str(), X_OK) != 0)
      return NotFound("there is no ", name, " in ", o.programs.string(), "; build or install it beside refinery");
  }
  // Held shared by everyone who uses the programs, so that the last one knows that it is the last.
  programs->users_fd_ = ::open((o.state / "run.users").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0644);
  if (programs->users_fd_ < 0 || ::flock(programs->users_fd_, LOCK_SH) != 0)
    return FailedPrecondition("cannot use the state folder ", o.state.string(), ": ", std::strerror(errno));
  return programs;
}

std::filesystem::path LocalPrograms::LogFile(const std::string& name) const { return options_.state / (name + ".log"); }

StatusOr<LocalPrograms::Record> LocalPrograms::Load() {
  Record record;
  auto text = ReadFile(options_.state / "run.json", kMaxRecordBytes);
  if (text.status().code() == absl::StatusCode::kNotFound) return record;
  if (!text.ok()) return text.status();
  Json json = Json::parse(*text, nullptr, false);
  if (!json.is_object()) return record;   // an empty record starts the programs anew
  auto program = [&](const char* name) {
    Json entry = json.value(name, Json::object());
    return Program{.pid = entry.value("pid", 0), .start_time = entry.value("start_time", uint64_t{0})};
  };
  record.address = json.value("address", "");
  record.coordinator = program(kCoordinator);
  record.worker = program(kWorker);
  record.requests = json.value("requests", std::map<std::string, std::string>());
  return record;
}

Status LocalPrograms::Save(const Record& record) {
  auto entry = [](const Program& program) { return Json{{"pid", program.pid}, {"start_time", program.start_time}}; };
  Json json = {{"address", record.address},
               {kCoordinator, entry(record.coordinator)},
               {kWorker, entry(record.worker)},
               {"requests", record.requests}};
  return WriteFileAtomically(options_.state / "run.json", json.dump(2) + "\n");
}

bool LocalPrograms::Alive(const Program& program) {
  if (auto child = children_.find(program.pid); child != children_.end() && child->second->TryWait().has_value())
    children_.erase(child);
  return program.pid > 0 && program.start_time > 0 && ProcessStartTime(program.pid) == program.start_time;
}

StatusOr<LocalPrograms::Program> LocalPrograms::Launch(const std::string& name, const std::string& address) {
  ProcessOptions options{.pipes = false, .log = LogFile(name), .new_session = true};
  options.command = {(options_.programs / name).string()};
  if (name == kCoordinator) {
    options.command.insert(options.command.end(), {"--listen", address, "--state", (options_.state / "coordinator").string(),
                                                   "--disk-full-free-gib", kDiskFullGib, "--disk-read-only-free-gib",
                                                   kDiskReadOnlyGib});
  } else {
    options.command.insert(options.command.end(), {"--coordinator", address});
    if (!options_.worker_cache.empty())
      options.command.insert(options.command.end(), {"--cache", options_.worker_cache.string()});
    if (!options_.task_program.empty())
      options.command.insert(options.command.end(), {"--task-program", options_.task_program.string()});
  }
  options.command.insert(options.command.end(), {"--metrics-address", "127.0.0.1:0"});
  RF_ASSIGN_OR_RETURN(std::unique_ptr<Process> process, Process::Start(options));
  Program program{.pid = process->pid(), .start_time = ProcessStartTime(process->pid())};
  children_[program.pid] = std::move(process);
  return program;
}

Status LocalPrograms::AwaitCoordinator(const Program& program, const std::string& address) {
  auto channel = MakeChannel(address);
  auto deadline = std::chrono::steady_clock::now() + kStartWait;
  while (std::chrono::steady_clock::now() < deadline) {
    if (WaitForConnection(*channel, address, milliseconds(200)).ok()) return absl::OkStatus();
    if (!Alive(program)) return FailedPrecondition("refineryd ended at once; its log says:\n", LogTail(kCoordinator));
  }
  return FailedPrecondition("refineryd does not answer at ", address, "; its log says:\n", LogTail(kCoordinator));
}

StatusOr<std::string> LocalPrograms::StartMissing(Record& record) {
  std::string started;
  if (!Alive(record.coordinator)) {
    // Another port could be taken meanwhile; a running worker knows only the old one.
    if (record.address.empty() || !Alive(record.worker)) {
      RF_ASSIGN_OR_RETURN(record.address, FreeAddress());
    }
    RF_ASSIGN_OR_RETURN(record.coordinator, Launch(kCoordinator, record.address));
    RF_RETURN_IF_ERROR(Save(record));
    RF_RETURN_IF_ERROR(AwaitCoordinator(record.coordinator, record.address));
    started = kCoordinator;
  }
  if (options_.worker && !Alive(record.worker)) {
    RF_ASSIGN_OR_RETURN(record.worker, Launch(kWorker, record.address));
    RF_RETURN_IF_ERROR(Save(record));
    started += started.empty() ? kWorker : Join(" and ", kWorker);
  }
  return started;
}

Status LocalPrograms::Start() {
  StateLock lock(options_.state);
  RF_ASSIGN_OR_RETURN(Record record, Load());
  RF_ASSIGN_OR_RETURN(std::string started, StartMissing(record));
  attached_ = started.empty();
  address_ = record.address;
  return absl::OkStatus();
}

StatusOr<std::string> LocalPrograms::Supervise() {
  RF_ASSIGN_OR_RETURN(Record record, Load());
  bool coordinator = Alive(record.coordinator);
  bool worker = Alive(record.worker) || !options_.worker;
  if (coordinator && worker) return std::string();
  StateLock lock(options_.state);
  RF_ASSIGN_OR_RETURN(record, Load());   // another run may have been faster
  std::string died;
  if (!coordinator && !Alive(record.coordinator)) died = kCoordinator;
  if (!worker && !Alive(record.worker)) died += died.empty() ? kWorker : Join(" and ", kWorker);
  if (died.empty()) return std::string();
  std::string tail = LogTail(coordinator ? kWorker : kCoordinator);
  if (++restarts_ > kMaxRestarts)
    return FailedPrecondition(died, " died ", kMaxRestarts, " times; the last log lines:\n", tail);
  // The running view and the worker know this address: the coordinator must come back at it.
  std::string address = record.address;
  if (!Alive(record.coordinator)) {
    RF_ASSIGN_OR_RETURN(record.coordinator, Launch(kCoordinator, address));
    RF_RETURN_IF_ERROR(Save(record));
    RF_RETURN_IF_ERROR(AwaitCoordinator(record.coordinator, address));
  }
  RF_RETURN_IF_ERROR(StartMissing(record).status());
  return Join(died, " died and was started again; its last log lines:\n", tail);
}

bool LocalPrograms::StopIfLast() {
  if (::flock(users_fd_, LOCK_EX | LOCK_NB) != 0) return false;
  StateLock lock(options_.state);
  auto record = Load();
  if (!record.ok()) return false;
  for (const Program& program : {record->worker, record->coordinator}) {
    if (Alive(program)) StopProcess(program.pid, program.start_time, kStopGrace);
  }
  record->worker = record->coordinator = Program();
  return Save(*record).ok();
}

StatusOr<std::string> LocalPrograms::RequestId(const std::string& content_digest) {
  StateLock lock(options_.state);
  RF_ASSIGN_OR_RETURN(Record record, Load());
  return record.requests[content_digest];
}

Status LocalPrograms::SetRequestId(const std::string& content_digest, const std::string& request_id) {
  StateLock lock(options_.state);
  RF_ASSIGN_OR_RETURN(Record record, Load());
  record.requests[content_digest] = request_id;
  return Save(record);
}

std::string LocalPrograms::LogTail(const std::string& name) const {
  auto text = ReadFile(LogFile(name));
  if (!text.ok()) return Join("(no log at ", LogFile(name).string(), ")");
  size_t begin = text->size();
  for (size_t lines = 0; begin > 0 && lines <= kTailLines; --begin) {
    if ((*text)[begin - 1] == '\n' && ++lines > kTailLines) break;
  }
  return text->substr(begin);
}

}  // namespace refinery::client
