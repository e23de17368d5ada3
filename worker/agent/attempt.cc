#include "worker/agent/attempt.h"

#include <signal.h>
#include <string.h>

#include <algorithm>

#include <google/protobuf/util/json_util.h>
#include <spdlog/spdlog.h>

#include "common/files.h"
#include "common/grpc_status.h"
#include "common/limits.h"
#include "worker/agent/coordinator_calls.h"

namespace refinery::agent {
namespace {

using Clock = std::chrono::steady_clock;

constexpr size_t kMaxPendingLog = 1 << 20;
constexpr size_t kMaxNotes = 1000;             // more of one attempt say nothing new
constexpr std::chrono::seconds kReportWait{10};

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

v1::TaskError MakeError(v1::FailureClass failure_class, absl::StatusCode code, const std::string& message) {
  v1::TaskError error;
  error.set_failure_class(failure_class);
  error.set_code(static_cast<int>(code));
  error.set_message(message.substr(0, limits::kMaxErrorBytes));
  return error;
}

// What went wrong around the task rather than in it.
v1::TaskError ErrorOfAgent(const Status& status) {
  v1::FailureClass failure_class = v1::INFRA;
  if (status.code() == absl::StatusCode::kResourceExhausted) failure_class = v1::NODE;   // disk full
  if (status.code() == absl::StatusCode::kInvalidArgument) failure_class = v1::BUG;
  return MakeError(failure_class, status.code(), Message(status));
}

bool IsFolderName(const std::string& name) {
  return !name.empty() && name.find('/') == std::string::npos && name != "." && name != "..";
}

// A folder name for one attempt: "trial/1/replicate/0", epoch 3 -> "trial-1-replicate-0.3".
std::string WorkName(const v1::LeaseToken& token) {
  std::string name = Join(token.job(), "-", token.path());
  std::replace_if(name.begin(), name.end(), [](unsigned char c) { return !std::isalnum(c); }, '-');
  return Join(name.substr(0, 100), ".", token.epoch());
}

std::string LowerCase(std::string text) {
  std::transform(text.begin(), text.end(), text.begin(), [](unsigned char c) { return std::tolower(c); });
  return text;
}

// How programs that compute together find each other, in the variables that torch.distributed and others read.
std::map<std::string, std::string> GangEnvironment(const v1::Gang& gang) {
  if (gang.id().empty()) return {};
  std::map<std::string, std::string> environment = {{"RANK", std::to_string(gang.rank())},
                                                    {"WORLD_SIZE", std::to_string(gang.world_size())}};
  if (gang.port() == 0) return environment;
  environment["MASTER_ADDR"] = gang.address();
  environment["MASTER_PORT"] = std::to_string(gang.port());
  return environment;
}

}  // namespace

// The folders of one attempt; removed with it.
struct Attempt::Work {
  std::filesystem::path root, inputs, outputs, checkpoints, spec, resume;
};

std::string KindName(const v1::TaskSpec& spec) {
  const google::protobuf::OneofDescriptor* params = spec.GetDescriptor()->FindOneofByName("params");
  const google::protobuf::FieldDescriptor* field = spec.GetReflection()->GetOneofFieldDescriptor(spec, params);
  return field == nullptr ? "unknown" : field->name();
}

Attempt::Attempt(const AttemptContext& context, v1::Lease lease)
    : context_(context),
      lease_(std::move(lease)),
      kind_(KindName(lease_.spec())),
      meeting_port_(context.ports->Use(lease_.gang().rank() == 0 ? lease_.gang().port() : 0)),
      log_(kMaxPendingLog, limits::kMaxLogBytesPerAttempt),
      thread_([this] { Run(); }) {}

Attempt::~Attempt() {
  if (thread_.joinable()) thread_.join();
}

bool Attempt::Forgotten() const { return forget_; }
bool Attempt::Stopped() const { return forget_ || drain_; }

void Attempt::Stop(End end) {
  if (end == End::kFence && task_ended_) return;
  (end == End::kDrain ? drain_ : forget_) = true;
  process_.Stop(context_.stop_grace);
  std::lock_guard<std::mutex> lock(mutex_);
  reported_.notify_all();
}

void Attempt::Run() {
  const Clock::time_point start = Clock::now();
  context_.metrics->AttemptStarted();
  spdlog::info("attempt {} of {} {} (job {}, epoch {}) started", lease_.attempt(), kind_, token().path(), token().job(),
               token().epoch());
  std::optional<v1::CompleteTaskRequest> request = Execute();
  std::string outcome = "cancelled";
  if (request.has_value()) {
    outcome = request->has_error() ? LowerCase(v1::FailureClass_Name(request->error().failure_class())) : "success";
    if (request->has_error()) {
      spdlog::warn("{} of job {} failed ({}): {}", token().path(), token().job(), outcome, request->error().message());
    }
    Complete(*std::move(request));
  }
  context_.metrics->AttemptEnded(kind_, outcome, SecondsSince(start));
  spdlog::info("attempt of {} (job {}) ended: {} after {:.1f} s", token().path(), token().job(), outcome,
               SecondsSince(start));
  finished_ = true;
  context_.on_finished();
}

ArtifactClient Attempt::MakeArtifactClient(std::function<bool()> cancelled) {
  ArtifactClient::Options options = context_.transfers;
  options.cancelled = std::move(cancelled);
  options.patient = [this](const Status& status) {
    if (!Stopped() && !waited_.exchange(true)) Log(Join("waiting for the coordinator: ", Message(status)));
    return !Stopped();
  };
  options.on_bytes = [this](uint64_t sent, uint64_t received) { context_.metrics->AddBytes(sent, received); };
  return ArtifactClient(context_.channel, std::move(options));
}

std::function<bool()> Attempt::UntilGivenUp() const {
  return [this, stopped_at = std::make_shared<Clock::time_point>(Clock::time_point::max())] {
    if (drain_ && *stopped_at == Clock::time_point::max()) *stopped_at = Clock::now();
    return Forgotten() || (drain_ && Clock::now() > *stopped_at + kReportWait);
  };
}

std::optional<v1::CompleteTaskRequest> Attempt::Execute() {
  const Clock::time_point start = Clock::now();
  v1::CompleteTaskRequest request;
  *request.mutable_lease() = token();
  auto fail = [&](const Status& status) -> std::optional<v1::CompleteTaskRequest> {
    if (Forgotten()) return std::nullopt;
    *request.mutable_error() =
        drain_ ? MakeError(v1::INFRA, absl::StatusCode::kCancelled, "the worker was stopped") : ErrorOfAgent(status);
    return request;
  };
  SetPhase("fetching inputs");
  StatusOr<Work> work = Prepare();
  if (!work.ok()) {
    context_.ports->TakeBack(meeting_port_);
    return fail(work.status());
  }
  struct RemoveAtEnd {
    std::filesystem::path folder;
    ~RemoveAtEnd() {
      std::error_code error;
      std::filesystem::remove_all(folder, error);
    }
  } remove_at_end{work->root};

  SetPhase("starting");
  uint64_t kills = OutOfMemoryKills();
  StatusOr<ExitInfo> info = RunTask(*work);
  if (!info.ok() || Stopped()) return fail(info.status());
  if (info->code != 0 || info->signal != 0) {
    *request.mutable_error() = ErrorOf(*info, kills);
    return request;
  }
  task_ended_ = true;
  SetPhase("uploading outputs");
  StatusOr<v1::ArtifactRef> output = UploadOutputs(*work);
  if (!output.ok()) return fail(output.status());
  auto* success = request.mutable_success();
  *success->mutable_output() = *output;
  success->set_seconds(SecondsSince(start));
  success->set_peak_memory_bytes(info->peak_memory_bytes);
  std::lock_guard<std::mutex> lock(mutex_);
  success->mutable_measurements()->Add(measurements_.begin(), measurements_.end());
  return request;
}

StatusOr<Attempt::Work> Attempt::Prepare() {
  Work work;
  work.root = context_.work / WorkName(token());
  work.inputs = work.root / "inputs";
  work.outputs = work.root / "outputs";
  work.checkpoints = work.root / "checkpoints";
  work.spec = work.root / "spec.json";
  std::error_code error;
  std::filesystem::remove_all(work.root, error);
  for (const auto& folder : {work.inputs, work.outputs, work.checkpoints}) RF_RETURN_IF_ERROR(CreateFolders(folder));

  ArtifactClient client = MakeArtifactClient([this] { return Stopped(); });
  auto fetch = [&](const v1::ArtifactRef& artifact, const std::filesystem::path& link) -> Status {
    auto folder = context_.artifacts->Fetch(artifact.digest(), client, [this] { return Stopped(); });
    if (!folder.ok()) return Annotate(folder.status(), Join("input '", artifact.name(), "'"));
    std::error_code link_error;
    std::filesystem::create_directory_symlink(std::filesystem::absolute(*folder), link, link_error);
    if (link_error) return Internal("cannot link ", link.string(), ": ", link_error.message());
    return absl::OkStatus();
  };
  for (const v1::ArtifactRef& input : lease_.spec().inputs()) {
    if (!IsFolderName(input.name())) return InvalidArgument("the input name '", input.name(), "' is not a folder name");
    RF_RETURN_IF_ERROR(fetch(input, work.inputs / input.name()));
  }
  if (lease_.has_checkpoint() && !lease_.checkpoint().digest().empty()) {
    work.resume = work.root / "resume";
    RF_RETURN_IF_ERROR(fetch(lease_.checkpoint(), work.resume));
    Log(Join("resuming from the checkpoint of step ", lease_.checkpoint_step()));
  }
  v1::TaskSpec spec = lease_.spec();
  if (spec.threads() == 0) spec.set_threads(context_.threads);
  std::string json;
  auto converted = google::protobuf::util::MessageToJsonString(spec, &json);
  if (!converted.ok()) return InvalidArgument("the task cannot be written as JSON: ", converted.ToString());
  RF_RETURN_IF_ERROR(WriteFileAtomically(work.spec, json));
  return work;
}

StatusOr<ExitInfo> Attempt::RunTask(const Work& work) {
  std::atomic<bool> skip{false};
  auto commit = [&](const std::filesystem::path& folder, uint64_t step) -> Status {
    auto cancelled = [&] { return Forgotten() || skip; };
    RF_ASSIGN_OR_RETURN(v1::ArtifactRef artifact, MakeArtifactClient(cancelled).UploadFolder(folder, "checkpoint"));
    v1::CommitCheckpointRequest request;
    *request.mutable_lease() = token();
    request.set_step(step);
    *request.mutable_checkpoint() = artifact;
    Status status = CommitCheckpoint(context_.channel, request,
                                     [&, given_up = UntilGivenUp()] { return skip || given_up(); });
    if (status.code() == absl::StatusCode::kAborted) Stop(End::kForget);   // another worker has the task
    return status;
  };
  CheckpointUploader checkpoints(work.checkpoints, commit, [&](const Status& status) {
    if (!skip && !Forgotten()) Log(Join("a checkpoint could not be committed: ", Message(status)));
  });
  TaskCommand command{.program = context_.task_program,
                      .spec = work.spec,
                      .inputs = work.inputs,
                      .outputs = work.outputs,
                      .checkpoints = work.checkpoints,
                      .cache = context_.cache,
                      .resume = work.resume,
                      .threads = lease_.spec().threads() > 0 ? lease_.spec().threads() : context_.threads,
                      .environment = GangEnvironment(lease_.gang())};
  auto on_event = [&](const v1::TaskEvent& event) {
    if (event.has_checkpoint()) {
      checkpoints.Submit(event.checkpoint().name(), event.checkpoint().step());
    } else {
      OnEvent(event);
    }
  };
  context_.ports->LetGo(meeting_port_);
  StatusOr<ExitInfo> info = process_.Run(command, on_event, [this](std::string_view line) { log_.Append(line); });
  context_.ports->TakeBack(meeting_port_);
  bool success = info.ok() && info->code == 0 && info->signal == 0;
  skip = success;                       // the outputs make them superfluous; a failure resumes from the last
  checkpoints.Finish(/*flush=*/!success && !Forgotten());
  return info;
}

void Attempt::OnEvent(const v1::TaskEvent& event) {
  std::lock_guard<std::mutex> lock(mutex_);
  switch (event.kind_case()) {
    case v1::TaskEvent::kProgress: {
      const v1::TaskProgress& now = event.progress();
      auto grown = [](uint64_t after, uint64_t before) { return after > before ? after - before : 0; };
      context_.metrics->AddTokens(grown(now.tokens_trained(), progress_.tokens_trained()),
                                  grown(now.tokens_generated(), progress_.tokens_generated()));
      if (now.loss() != 0) context_.metrics->SetLoss(kind_, now.loss());
      progress_ = now;
      break;
    }
    case v1::TaskEvent::kMeasurement:
      measurements_.push_back(event.measurement());
      break;
    case v1::TaskEvent::kNote:
      if (notes_.size() < kMaxNotes) notes_.push_back(event.note());
      break;
    case v1::TaskEvent::kError:
      error_ = event.error();
      break;
    default:
      break;
  }
}

StatusOr<v1::ArtifactRef> Attempt::UploadOutputs(const Work& work) {
  ArtifactClient client = MakeArtifactClient([this] { return Stopped(); });
  RF_ASSIGN_OR_RETURN(v1::ArtifactRef output, client.UploadFolder(work.outputs, kind_));
  context_.artifacts->Adopt(output.digest(), work.outputs);   // the next task on this worker probably reads it
  return output;
}

v1::TaskError Attempt::ErrorOf(const ExitInfo& info, uint64_t out_of_memory_kills) const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::string tail = log_.Tail();
  std::string log = tail.empty() ? "" : Join("; last log lines:\n", tail);
  if (info.signal == SIGKILL && OutOfMemoryKills() > out_of_memory_kills) {
    return MakeError(v1::RESOURCE, absl::StatusCode::kResourceExhausted,
                     Join("refinery-task was killed for lack of memory (peak ",
                          info.peak_memory_bytes >> 20, " MiB)", log));
  }
  if (info.signal != 0) {
    return MakeError(v1::INFRA, absl::StatusCode::kUnavailable,
                     Join("refinery-task was ended by signal ", info.signal, " (", ::strsignal(info.signal), ")", log));
  }
  if (error_.has_value()) return *error_;
  return MakeError(v1::BUG, absl::StatusCode::kInternal,
                   Join("refinery-task ended with code ", info.code, " and gave no reason", log));
}

void Attempt::Complete(v1::CompleteTaskRequest request) {
  {
    // A part of the log or a note that is on its way must not be sent a second time.
    std::unique_lock<std::mutex> lock(mutex_);
    reported_.wait_for(lock, kReportWait, [&] { return !in_flight_ || Forgotten(); });
    task_ended_ = true;
    completing_ = true;                    // from here on Report() sends neither
    request.mutable_notes()->Add(notes_.begin(), notes_.end());
    LogBuffer::Part part = log_.Peek(kMaxPendingLog * 2);
    request.set_log(std::move(part.text));
    request.set_log_offset(part.offset);
  }
  Status status = CompleteTask(context_.channel, request, UntilGivenUp());
  if (!status.ok()) {
    spdlog::warn("the coordinator did not take the end of {} (job {}, epoch {}): {}", token().path(), token().job(),
                 token().epoch(), Message(status));
  }
}

v1::RunningAttempt Attempt::Report() {
  std::lock_guard<std::mutex> lock(mutex_);
  v1::RunningAttempt report;
  *report.mutable_lease() = token();
  *report.mutable_progress() = progress_;
  if (completing_ || in_flight_) return report;
  notes_in_flight_ = notes_.size();
  report.mutable_notes()->Add(notes_.begin(), notes_.end());
  LogBuffer::Part part = log_.Peek(limits::kMaxLogChunkBytes);
  report.set_log_offset(part.offset);
  log_in_flight_ = part.offset + part.text.size();
  report.set_log(std::move(part.text));
  in_flight_ = notes_in_flight_ > 0 || !report.log().empty();
  return report;
}

void Attempt::Reported(bool arrived) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (arrived && in_flight_ && !completing_) {
    notes_.erase(notes_.begin(), notes_.begin() + static_cast<int64_t>(notes_in_flight_));
    log_.Acknowledge(log_in_flight_);
  }
  in_flight_ = false;
  reported_.notify_all();
}

void Attempt::SetPhase(const std::string& phase) {
  std::lock_guard<std::mutex> lock(mutex_);
  progress_.set_phase(phase);
}

void Attempt::Log(const std::string& line) { log_.Append("[worker] " + line); }

}  // namespace refinery::agent
