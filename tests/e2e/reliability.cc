// Goal: the coordinator keeps its promises when programs are killed, stopped, cut off, out of disk or robbed of their blobs.
// Method: real processes on loopback, driven over gRPC; the client keeps its own ledger of what was acknowledged.
//
//   refinery_reliability [--full] [NAME...]      (make reliability; the quick form is a test)
//
// Prints a row per claim and exits 1 when one is broken.

#include "tests/e2e/reliability.h"

#include <grpcpp/create_channel.h>
#include <signal.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <fstream>

#include "common/artifact_client.h"
#include "common/files.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/recipe.h"
#include "common/temporary_folder.h"
#include "tests/server/api/fake_worker.h"

namespace refinery::reliability {
namespace {

constexpr double kStartLimit = 30;

void SetDeadline(grpc::ClientContext& context, double seconds) {
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(static_cast<int>(seconds * 1000)));
}

}  // namespace

void Checks::Row(const std::string& name, double value, const char* unit, const std::string& bound, bool ok) {
  std::lock_guard lock(mutex_);
  std::printf("%-66s %10.2f %-4s %-10s %s\n", name.c_str(), value, unit, bound.c_str(), ok ? "ok" : "BROKEN");
  std::fflush(stdout);
  ok_ &= ok;
}

void Checks::Skip(const std::string& name, const std::string& why) {
  std::lock_guard lock(mutex_);
  std::printf("%-66s skipped: %s\n", name.c_str(), why.c_str());
}

void Checks::Relay(const std::string& rows, bool ok) {
  std::lock_guard lock(mutex_);
  std::fputs(rows.c_str(), stdout);
  std::fflush(stdout);
  ok_ &= ok;
}

Coordinator::Coordinator(Options options) : options_(std::move(options)) {
  RF_CHECK(CreateFolders(options_.state).ok());
  Launch(true);
  supervisor_ = std::thread([this] { Supervise(); });
}

Coordinator::~Coordinator() {
  stopping_ = true;
  supervisor_.join();
  Kill();
}

void Coordinator::Launch(bool first) {
  const std::filesystem::path address_file = options_.state / "address";
  std::error_code ignored;
  std::filesystem::remove(address_file, ignored);
  std::vector<std::string> command = {(ProgramFolder() / "refineryd").string(), "--state", options_.state.string(), "--listen",
                                      address_.empty() ? options_.listen : address_, "--metrics-address", "none"};
  if (!options_.own_disk) command.insert(command.end(), {"--disk-full-free-gib", "0", "--disk-read-only-free-gib", "0"});
  command.insert(command.end(), options_.flags.begin(), options_.flags.end());
  std::map<std::string, std::string> environment = options_.environment;
  if (first) environment.insert(options_.first_environment.begin(), options_.first_environment.end());
  auto process = Process::Start({.command = command, .environment = environment, .pipes = false,
                                 .log = options_.state.parent_path() / (options_.state.filename().string() + ".log")});
  RF_CHECK(process.ok());
  const Clock::time_point start = Clock::now();
  while (!std::filesystem::exists(address_file) && !(*process)->Ended()) {
    RF_CHECK(SecondsSince(start) < kStartLimit && "refineryd does not serve");
    Sleep(0.003);
  }
  if (address_.empty()) std::ifstream(address_file) >> address_;
  process_ = *std::move(process);
}

void Coordinator::Supervise() {
  while (!stopping_) {
    {
      std::lock_guard lock(mutex_);
      if (wanted_ && process_ != nullptr && process_->Ended()) {
        const ExitInfo info = process_->Wait();
        last_code_ = info.signal != 0 ? 128 + info.signal : info.code;
        ++deaths_;
        Launch(false);
      }
    }
    Sleep(0.01);
  }
}

int Coordinator::port() const { return std::atoi(address_.substr(address_.rfind(':') + 1).c_str()); }

std::shared_ptr<grpc::Channel> Coordinator::Connect() const {
  grpc::ChannelArguments args;
  args.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  args.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  args.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  args.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 100);
  args.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 100);
  return grpc::CreateCustomChannel(address_, grpc::InsecureChannelCredentials(), args);
}

void Coordinator::Kill() {
  std::lock_guard lock(mutex_);
  wanted_ = false;
  if (process_ == nullptr) return;
  process_->Signal(SIGKILL);
  process_->Wait();
  process_.reset();
}

void Coordinator::Start() {
  std::lock_guard lock(mutex_);
  if (process_ == nullptr) Launch(false);
  wanted_ = true;
}

int Coordinator::StopGently() {
  std::lock_guard lock(mutex_);
  wanted_ = false;
  process_->Signal(SIGTERM);
  const ExitInfo info = process_->Wait();
  process_.reset();
  return info.signal != 0 ? 128 + info.signal : info.code;
}

std::unique_ptr<Process> StartWorker(const std::string& address, const std::filesystem::path& cache, const std::string& id, int slots,
                                     const std::vector<std::string>& prefix) {
  std::vector<std::string> command = prefix;
  command.insert(command.end(), {(ProgramFolder() / "refinery-worker").string(), "--coordinator", address, "--cache", cache.string(), "--id",
                                 id, "--slots", Join(slots), "--task-program", (ProgramFolder() / "fake_task").string(),
                                 "--metrics-address", "none"});
  auto worker = Process::Start({.command = command, .pipes = false, .log = cache.string() + ".log"});
  RF_CHECK(worker.ok());
  return *std::move(worker);
}

v1::Recipe Recipe(const std::string& uri, uint32_t shards, uint64_t seed) {
  v1::Recipe recipe;
  recipe.set_name("reliable");
  recipe.set_seed(seed);
  recipe.mutable_student()->set_model(uri);
  recipe.mutable_data()->set_task("arc_easy");
  recipe.mutable_data()->set_description("Answer the question.");
  recipe.mutable_data()->mutable_seeds()->set_benchmark("arc_easy");
  recipe.mutable_data()->mutable_seeds()->set_split("train");
  recipe.mutable_data()->mutable_synthesize()->set_examples(std::max(8u, shards));
  recipe.mutable_data()->mutable_synthesize()->set_shards(shards);
  v1::Benchmark* benchmark = recipe.mutable_evaluate()->add_benchmarks();
  benchmark->set_name("arc_easy");
  benchmark->set_limit(10);
  FillDefaults(&recipe);
  return recipe;
}

StatusOr<std::string> Submit(const std::shared_ptr<grpc::Channel>& channel, const v1::Recipe& recipe, const std::string& request_id) {
  v1::CreateJobRequest request;
  *request.mutable_recipe() = recipe;
  request.set_request_id(request_id);
  RF_ASSIGN_OR_RETURN(const TemporaryFolder folder, TemporaryFolder::Make("refinery-reliability"));
  const std::filesystem::path rows = folder.path();
  RF_RETURN_IF_ERROR(WriteFileAtomically(rows / "rows.jsonl", "{}\n"));
  RF_RETURN_IF_ERROR(Persist([&]() -> Status {
    RF_ASSIGN_OR_RETURN(const v1::ArtifactRef ref, ArtifactClient(channel).UploadFolder(rows, "rows"));
    for (const char* role : {"seeds", "benchmark/arc_easy"}) (*request.mutable_files())[role] = ref.digest();
    return absl::OkStatus();
  }));
  const auto stub = v1::JobService::NewStub(channel);
  v1::Job job;
  RF_RETURN_IF_ERROR(Persist([&] {
    grpc::ClientContext context;
    SetDeadline(context, 5);
    return FromGrpc(stub->CreateJob(&context, request, &job));
  }));
  return job.id();
}

StatusOr<v1::Job> Describe(const std::shared_ptr<grpc::Channel>& channel, const std::string& id) {
  const auto stub = v1::JobService::NewStub(channel);
  v1::GetJobRequest request;
  request.set_id(id);
  v1::Job job;
  RF_RETURN_IF_ERROR(Persist([&] {
    grpc::ClientContext context;
    SetDeadline(context, 5);
    return FromGrpc(stub->GetJob(&context, request, &job));
  }));
  return job;
}

StatusOr<v1::Task> Await(const std::shared_ptr<grpc::Channel>& channel, const std::string& job, const std::string& path,
                         const std::function<bool(const v1::Task&)>& wanted, double limit) {
  const Clock::time_point start = Clock::now();
  std::string last;
  while (SecondsSince(start) < limit) {
    RF_ASSIGN_OR_RETURN(const v1::Job now, Describe(channel, job));
    for (const v1::Task& task : now.tasks()) {
      if (task.path() != path) continue;
      if (wanted(task)) return task;
      last = task.ShortDebugString();
    }
    Sleep(0.02);
  }
  return absl::DeadlineExceededError(Join(path, " did not come to what was waited for: ", last));
}

StatusOr<v1::Job> PlayToTheEnd(const std::shared_ptr<grpc::Channel>& channel, const std::string& job, double limit) {
  testing::FakeWorker worker(channel, Join("player-", job));
  const Clock::time_point start = Clock::now();
  while (SecondsSince(start) < limit) {
    RF_ASSIGN_OR_RETURN(v1::Job now, Describe(channel, job));
    if (now.state() >= v1::Job::SUCCEEDED) return now;
    const StatusOr<v1::Lease> lease = worker.Next(1'500);
    if (!lease.ok() || lease->token().job().empty()) continue;
    v1::CompleteTaskRequest request;
    Status status = Persist([&]() -> Status {
      RF_ASSIGN_OR_RETURN(request, worker.MakeSuccess(*lease));
      return absl::OkStatus();
    });
    if (status.ok()) status = Persist([&] { return worker.Complete(request); });
    if (!status.ok() && !absl::IsAborted(status)) return status;
  }
  return absl::DeadlineExceededError(Join("job ", job, " did not end"));
}

std::map<std::string, std::string> OutputsOf(const v1::Job& job) {
  std::map<std::string, std::string> outputs;
  for (const v1::Task& task : job.tasks()) outputs[task.path()] = task.output().digest();
  return outputs;
}

namespace {

const std::vector<std::pair<std::string, void (*)(const Settings&, Checks&)>>& AllParts() {
  static const auto& parts = *new std::vector<std::pair<std::string, void (*)(const Settings&, Checks&)>>{
      {"kills", Kills},           {"away", Away},          {"lost_workers", LostWorkers}, {"bad_network", BadNetwork},
      {"partition", Partition},   {"stale_commits", StaleCommits},
      {"failpoints", Failpoints}, {"blob_loss", BlobLoss}, {"small_disk", SmallDisk}};
  return parts;
}

int Main(int argc, char** argv) {
  Settings settings;
  std::vector<std::string> names;
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--full") == 0) {
      settings = {.full = true, .inside_namespace = settings.inside_namespace, .lease_ttl = limits::kLeaseTtl, .away_seconds = 20,
                  .kills = 200};
    } else if (std::strcmp(argv[i], "--inside-namespace") == 0) {
      settings.inside_namespace = true;
    } else if (std::any_of(AllParts().begin(), AllParts().end(), [&](const auto& part) { return part.first == argv[i]; })) {
      names.push_back(argv[i]);
    } else {
      std::fprintf(stderr, "there is no part '%s'; usage: refinery_reliability [--full] [NAME...], where NAME is one of", argv[i]);
      for (const auto& [name, run] : AllParts()) std::fprintf(stderr, " %s", name.c_str());
      std::fprintf(stderr, "\n");
      return 2;
    }
  }
  StatusOr<TemporaryFolder> folder = TemporaryFolder::Make("refinery-reliability");
  RF_CHECK(folder.ok());
  settings.folder = folder->path();
  Checks checks;
  for (const auto& [name, run] : AllParts()) {
    if (names.empty() || std::find(names.begin(), names.end(), name) != names.end()) run(settings, checks);
  }
  if (!settings.inside_namespace) std::printf("%s\n", checks.ok() ? "all promises kept" : "a promise was broken");
  return checks.ok() ? 0 : 1;
}

}  // namespace
}  // namespace refinery::reliability

int main(int argc, char** argv) { return refinery::reliability::Main(argc, argv); }
