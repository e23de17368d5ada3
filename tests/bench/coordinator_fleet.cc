#include "tests/bench/coordinator_fleet.h"

#include <grpcpp/create_channel.h>
#include <signal.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <sstream>

#include "common/artifact_client.h"
#include "common/files.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "common/recipe.h"
#include "common/temporary_folder.h"

namespace refinery::bench {
namespace {

constexpr std::chrono::seconds kCallLimit{60};

void SetDeadline(grpc::ClientContext& context, std::chrono::milliseconds limit = kCallLimit) {
  context.set_deadline(std::chrono::system_clock::now() + limit);
}

double Since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

}  // namespace

void Must(const Status& status, const char* doing) {
  if (status.ok()) return;
  std::fprintf(stderr, "refinery_coordinator_benchmark: %s: %s\n", doing, Message(status).c_str());
  std::_Exit(2);
}

Daemon::Daemon(std::filesystem::path state, std::vector<std::string> flags) : state_(std::move(state)) {
  Must(CreateFolders(state_), "making the state folder");
  std::error_code ignored;
  std::filesystem::remove(state_ / "address", ignored);
  std::vector<std::string> command = {(ProgramFolder() / "refineryd").string(), "--state", state_.string(), "--listen",
                                      "127.0.0.1:0", "--metrics-address", "none", "--disk-full-free-gib", "0",
                                      "--disk-read-only-free-gib", "0"};
  command.insert(command.end(), flags.begin(), flags.end());
  const Clock::time_point start = Clock::now();
  process_ = Must(Process::Start({.command = command, .pipes = false, .log = state_ / "refineryd.log"}), "starting refineryd");
  while (!std::filesystem::exists(state_ / "address")) {
    if (process_->Ended()) Must(Unavailable("it ended; see ", (state_ / "refineryd.log").string()), "starting refineryd");
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  std::ifstream(state_ / "address") >> address_;
  // The first answer that needs the state, not just the port.
  const auto stub = v1::JobService::NewStub(Connect());
  grpc::ClientContext context;
  SetDeadline(context);
  context.set_wait_for_ready(true);
  v1::ListJobsRequest request;
  request.set_page_size(1);
  v1::ListJobsResponse response;
  Must(FromGrpc(stub->ListJobs(&context, request, &response)), "the first call");
  seconds_to_serving_ = Since(start);
}

void Daemon::Kill() {
  if (process_ == nullptr) return;
  process_->Signal(SIGKILL);
  process_->Wait();
  process_.reset();
}

void Daemon::Stop() {
  process_->Signal(SIGTERM);
  process_->Wait();
  process_.reset();
}

double Daemon::ResidentMib() const {
  std::ifstream file(Join("/proc/", process_->pid(), "/status"));
  for (std::string line; std::getline(file, line);) {
    if (line.starts_with("VmRSS:")) return std::strtod(line.c_str() + 6, nullptr) / 1024;
  }
  return 0;
}

double Daemon::CpuSeconds() const {
  std::ifstream file(Join("/proc/", process_->pid(), "/stat"));
  std::string text((std::istreambuf_iterator<char>(file)), {});
  std::istringstream rest(text.substr(text.rfind(')') + 2));
  std::string skipped;
  for (int i = 0; i < 11; ++i) rest >> skipped;
  double user = 0, system = 0;
  rest >> user >> system;
  return (user + system) / static_cast<double>(sysconf(_SC_CLK_TCK));
}

std::shared_ptr<grpc::Channel> Daemon::Connect() const {
  grpc::ChannelArguments args;
  args.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  args.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  args.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  args.SetMaxReceiveMessageSize(limits::kMaxMessageBytes);
  return grpc::CreateCustomChannel(address_, grpc::InsecureChannelCredentials(), args);
}

v1::Recipe WideRecipe(uint64_t seed, uint32_t shards) {
  v1::Recipe recipe;
  recipe.set_name("wide");
  recipe.set_seed(seed);
  recipe.mutable_student()->set_model("/models/student.gguf");
  recipe.mutable_data()->set_task("arc_easy");
  recipe.mutable_data()->set_description("Answer the question.");
  recipe.mutable_data()->mutable_seeds()->set_benchmark("arc_easy");
  recipe.mutable_data()->mutable_seeds()->set_split("train");
  recipe.mutable_data()->mutable_synthesize()->set_examples(shards);
  recipe.mutable_data()->mutable_synthesize()->set_shards(shards);
  v1::Benchmark* benchmark = recipe.mutable_evaluate()->add_benchmarks();
  benchmark->set_name("arc_easy");
  benchmark->set_limit(10);
  FillDefaults(&recipe);
  return recipe;
}

std::string UploadOutput(const std::shared_ptr<grpc::Channel>& channel) {
  const TemporaryFolder folder = Must(TemporaryFolder::Make("refinery-bench"), "making a folder");
  const std::filesystem::path path = folder.path();
  Must(WriteFileAtomically(path / "out.txt", "what a played task made\n"), "writing an output");
  return Must(ArtifactClient(channel).UploadFolder(path, "output"), "uploading an output").digest();
}

std::vector<std::string> SubmitJobs(const Daemon& daemon, uint32_t count, uint32_t shards, const std::string& output) {
  const std::shared_ptr<grpc::Channel> channel = daemon.Connect();
  const auto jobs = v1::JobService::NewStub(channel);
  std::vector<std::string> ids;
  for (uint32_t i = 0; i < count; ++i) {
    v1::CreateJobRequest request;
    *request.mutable_recipe() = WideRecipe(i + 1, shards);
    for (const char* role : {"seeds", "benchmark/arc_easy"}) (*request.mutable_files())[role] = output;
    request.set_request_id(Join("bench-", i));
    grpc::ClientContext context;
    SetDeadline(context);
    v1::Job job;
    Must(FromGrpc(jobs->CreateJob(&context, request, &job)), "creating a job");
    ids.push_back(job.id());
  }
  // Nothing but the imports is ready yet, so one question brings all of them. Each job has one: the student is its own teacher.
  const auto workers = v1::WorkerService::NewStub(channel);
  v1::SynchronizeRequest request;
  request.mutable_worker()->set_id("importer");
  request.set_incarnation("1");
  request.set_free_slots(count);
  grpc::ClientContext context;
  SetDeadline(context);
  v1::SynchronizeResponse response;
  Must(FromGrpc(workers->Synchronize(&context, request, &response)), "asking for the imports");
  if (response.grants_size() != static_cast<int>(count)) Must(Internal("got ", response.grants_size()), "asking for the imports");
  for (const v1::Lease& lease : response.grants()) {
    v1::CompleteTaskRequest complete;
    *complete.mutable_lease() = lease.token();
    complete.mutable_success()->mutable_output()->set_digest(output);
    grpc::ClientContext complete_context;
    SetDeadline(complete_context);
    v1::CompleteTaskResponse answer;
    Must(FromGrpc(workers->CompleteTask(&complete_context, complete, &answer)), "completing an import");
  }
  return ids;
}

Timer::Timer() : thread_([this] {
  std::unique_lock lock(mutex_);
  while (!stopping_) {
    if (entries_.empty()) {
      wake_.wait(lock);
    } else if (entries_.top().time > Clock::now()) {
      const Clock::time_point next = entries_.top().time;
      wake_.wait_until(lock, next);
    } else {
      const std::function<void()> call = entries_.top().call;
      entries_.pop();
      lock.unlock();
      call();
      lock.lock();
    }
  }
}) {}

Timer::~Timer() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  thread_.join();
}

void Timer::At(Clock::time_point time, std::function<void()> call) {
  std::lock_guard lock(mutex_);
  entries_.push({time, std::move(call)});
  wake_.notify_all();
}

void FleetCounts::WaitForCalls() {
  while (open_calls > 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
}

struct SimulatedWorker::SynchronizeCall {
  grpc::ClientContext context;
  v1::SynchronizeRequest request;
  v1::SynchronizeResponse response;
  Clock::time_point sent;
};

struct SimulatedWorker::CompleteCall {
  grpc::ClientContext context;
  v1::CompleteTaskRequest request;
  v1::CompleteTaskResponse response;
};

SimulatedWorker::SimulatedWorker(Options options)
    : options_(std::move(options)), stub_(v1::WorkerService::NewStub(options_.channel)), random_(options_.seed) {}

void SimulatedWorker::Send(std::unique_ptr<SynchronizeCall> call,
                           std::function<void(const v1::SynchronizeResponse&, double)> answered) {
  call->request.mutable_worker()->set_id(options_.id);
  call->request.mutable_worker()->set_host("loopback");
  call->request.set_incarnation("1");
  SetDeadline(call->context);
  call->sent = Clock::now();
  ++options_.counts->open_calls;
  SynchronizeCall* raw = call.release();
  stub_->async()->Synchronize(&raw->context, &raw->request, &raw->response,
                              [this, raw, answered = std::move(answered)](const grpc::Status& status) {
                                const std::unique_ptr<SynchronizeCall> owned(raw);
                                if (!status.ok()) ++options_.counts->failed_calls;
                                if (status.ok() && !options_.counts->stopping) answered(raw->response, Since(raw->sent));
                                --options_.counts->open_calls;
                              });
}

void SimulatedWorker::Ask() {
  if (options_.counts->stopping) return;
  auto call = std::make_unique<SynchronizeCall>();
  call->request.set_free_slots(options_.slots);
  Send(std::move(call), [this](const v1::SynchronizeResponse& response, double seconds) { Granted(response, seconds); });
}

void SimulatedWorker::Granted(const v1::SynchronizeResponse& response, double seconds) {
  if (response.grants().empty()) return Ask();
  options_.counts->granted += response.grants_size();
  if (options_.mean_seconds == 0) {
    outstanding_ = response.grants_size();
    for (const v1::Lease& lease : response.grants()) Complete(lease.token());
    return;
  }
  {
    std::lock_guard lock(options_.counts->mutex);
    options_.counts->grant_ms.push_back(seconds * 1e3);
  }
  outstanding_ = 1;
  running_ = response.grants(0).token();
  const double work = std::exponential_distribution<double>(1 / options_.mean_seconds)(random_);
  end_ = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(work));
  Work();
}

// Until the task's end: a word every second, as often as the coordinator asks for.
void SimulatedWorker::Work() {
  const Clock::time_point next = Clock::now() + limits::kSynchronizeInterval;
  if (end_ <= next) return options_.timer->At(end_, [this] { Complete(running_); });
  options_.timer->At(next, [this] { Renew(); });
}

void SimulatedWorker::Renew() {
  if (options_.counts->stopping) return;
  auto call = std::make_unique<SynchronizeCall>();
  v1::RunningAttempt* attempt = call->request.add_running();
  *attempt->mutable_lease() = running_;
  attempt->mutable_progress()->set_phase("generating");
  attempt->mutable_progress()->set_done(1);
  attempt->mutable_progress()->set_total(10);
  Send(std::move(call), [this](const v1::SynchronizeResponse&, double) { Work(); });
}

void SimulatedWorker::Complete(const v1::LeaseToken& token) {
  if (options_.counts->stopping) return;
  auto* call = new CompleteCall;
  *call->request.mutable_lease() = token;
  call->request.mutable_success()->mutable_output()->set_digest(options_.output);
  call->request.mutable_success()->set_seconds(0.5);
  SetDeadline(call->context);
  ++options_.counts->open_calls;
  stub_->async()->CompleteTask(&call->context, &call->request, &call->response, [this, call](const grpc::Status& status) {
    const std::unique_ptr<CompleteCall> owned(call);
    ++(status.ok() ? options_.counts->completed : options_.counts->failed_calls);
    if (--outstanding_ == 0) Ask();
    --options_.counts->open_calls;
  });
}

double Quantile(std::vector<double> values, double p) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[std::min(values.size() - 1, static_cast<size_t>(p * static_cast<double>(values.size())))];
}

}  // namespace refinery::bench
