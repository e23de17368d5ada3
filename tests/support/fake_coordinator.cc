#include "tests/support/fake_coordinator.h"

#include <grpcpp/security/server_credentials.h>

#include <algorithm>

#include "common/digest.h"

namespace refinery::testing {
namespace {
constexpr size_t kReadChunk = 64 << 10;
const grpc::Status kCut(grpc::StatusCode::UNAVAILABLE, "cut by the test");
}  // namespace

void FakeArtifacts::CutAfter(uint64_t bytes, int cuts) {
  std::lock_guard<std::mutex> lock(mutex_);
  cut_after_ = bytes;
  cuts_ = cuts;
}

void FakeArtifacts::Refuse(const grpc::Status& status, int times) {
  std::lock_guard<std::mutex> lock(mutex_);
  refusal_ = status;
  refusals_ = times;
}

int FakeArtifacts::refusals_left() {
  std::lock_guard<std::mutex> lock(mutex_);
  return refusals_;
}

grpc::Status FakeArtifacts::TakeRefusal() {
  std::lock_guard<std::mutex> lock(mutex_);
  if (refusals_ <= 0) return grpc::Status::OK;
  --refusals_;
  return refusal_;
}

void FakeArtifacts::CorruptReads(bool corrupt) {
  std::lock_guard<std::mutex> lock(mutex_);
  corrupt_ = corrupt;
}

std::map<std::string, std::string> FakeArtifacts::blobs() {
  std::lock_guard<std::mutex> lock(mutex_);
  return blobs_;
}

uint64_t FakeArtifacts::bytes_written() {
  std::lock_guard<std::mutex> lock(mutex_);
  return bytes_written_;
}

std::string FakeArtifacts::Put(const std::string& bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::string digest = DigestOf(bytes);
  blobs_[digest] = bytes;
  return digest;
}

std::string FakeArtifacts::PutFolder(const std::map<std::string, std::string>& files) {
  std::vector<FileEntry> entries;
  for (const auto& [path, text] : files) entries.push_back({.path = path, .digest = Put(text), .size = text.size()});
  return Put(ManifestText(entries));
}

std::map<std::string, std::string> FakeArtifacts::Folder(const std::string& digest) {
  std::lock_guard<std::mutex> lock(mutex_);
  std::map<std::string, std::string> files;
  auto entries = ParseManifest(blobs_[digest]);
  if (!entries.ok()) return {};
  for (const FileEntry& entry : *entries) {
    if (blobs_.count(entry.digest) == 0) return {};
    files[entry.path] = blobs_[entry.digest];
  }
  return files;
}

// Whether a transfer that has moved so many bytes is to be cut now.
bool FakeArtifacts::TakeCut(uint64_t moved) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (cuts_ <= 0 || moved < cut_after_) return false;
  --cuts_;
  return true;
}

grpc::Status FakeArtifacts::FindMissingBlobs(grpc::ServerContext*, const v1::FindMissingBlobsRequest* request,
                                             v1::FindMissingBlobsResponse* response) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const std::string& digest : request->digests()) {
    if (blobs_.count(digest) == 0) response->add_missing(digest);
  }
  return grpc::Status::OK;
}

grpc::Status FakeArtifacts::QueryWriteStatus(grpc::ServerContext*, const v1::QueryWriteStatusRequest* request,
                                             v1::QueryWriteStatusResponse* response) {
  std::lock_guard<std::mutex> lock(mutex_);
  auto blob = blobs_.find(request->digest());
  response->set_complete(blob != blobs_.end());
  response->set_committed_size(blob != blobs_.end() ? blob->second.size() : partial_[request->digest()].size());
  return grpc::Status::OK;
}

grpc::Status FakeArtifacts::WriteBlob(grpc::ServerContext*, grpc::ServerReader<v1::WriteBlobRequest>* reader,
                                      v1::WriteBlobResponse* response) {
  if (grpc::Status refused = TakeRefusal(); !refused.ok()) return refused;
  v1::WriteBlobRequest request;
  std::string digest;
  uint64_t moved = 0;
  while (reader->Read(&request)) {
    if (digest.empty()) digest = request.digest();
    std::unique_lock<std::mutex> lock(mutex_);
    std::string& bytes = partial_[digest];
    if (request.offset() != bytes.size()) return {grpc::StatusCode::INVALID_ARGUMENT, "offset is not contiguous"};
    bytes += request.data();
    bytes_written_ += request.data().size();
    response->set_committed_size(bytes.size());
    if (request.finish()) {
      if (DigestOf(bytes) != digest) return {grpc::StatusCode::INVALID_ARGUMENT, "wrong digest"};
      blobs_[digest] = bytes;
      partial_.erase(digest);
      return grpc::Status::OK;
    }
    moved += request.data().size();
    lock.unlock();
    if (TakeCut(moved)) return kCut;
  }
  return grpc::Status::OK;
}

grpc::Status FakeArtifacts::ReadBlob(grpc::ServerContext*, const v1::ReadBlobRequest* request,
                                     grpc::ServerWriter<v1::ReadBlobResponse>* writer) {
  if (grpc::Status refused = TakeRefusal(); !refused.ok()) return refused;
  std::string bytes;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    auto blob = blobs_.find(request->digest());
    if (blob == blobs_.end()) return {grpc::StatusCode::NOT_FOUND, "no such blob"};
    if (request->offset() > blob->second.size()) return {grpc::StatusCode::OUT_OF_RANGE, "beyond the end"};
    bytes = blob->second.substr(request->offset());
    if (corrupt_ && !bytes.empty()) bytes.back() ^= 1;
  }
  for (size_t begin = 0; begin < bytes.size(); begin += kReadChunk) {
    v1::ReadBlobResponse response;
    response.set_data(bytes.substr(begin, kReadChunk));
    writer->Write(response);
    if (TakeCut(begin + response.data().size())) return kCut;
  }
  return grpc::Status::OK;
}

void FakeWorkers::Grant(const v1::Lease& lease) {
  std::lock_guard<std::mutex> lock(mutex_);
  grants_.push_back(lease);
  changed_.notify_all();
}

void FakeWorkers::CancelLease(const v1::LeaseToken& token) {
  std::lock_guard<std::mutex> lock(mutex_);
  cancels_.push_back(token);
}

void FakeWorkers::SetLeaseTtl(std::chrono::milliseconds ttl) {
  std::lock_guard<std::mutex> lock(mutex_);
  ttl_ = ttl;
}

void FakeWorkers::FailCompletes(int times) {
  std::lock_guard<std::mutex> lock(mutex_);
  fail_completes_ = times;
}

void FakeWorkers::AbortCompletes() {
  std::lock_guard<std::mutex> lock(mutex_);
  abort_completes_ = true;
}

bool FakeWorkers::WaitFor(const std::function<bool(const Record&)>& done, std::chrono::seconds wait) {
  std::unique_lock<std::mutex> lock(mutex_);
  return changed_.wait_for(lock, wait, [&] { return done(record_); });
}

FakeWorkers::Record FakeWorkers::record() {
  std::lock_guard<std::mutex> lock(mutex_);
  return record_;
}

void FakeWorkers::AddLog(uint64_t offset, const std::string& text) {
  if (offset > record_.log.size()) record_.log += "<gap>";
  if (offset + text.size() > record_.log.size()) record_.log.replace(offset, std::string::npos, text);
}

void FakeWorkers::SetRenews(bool renews) {
  std::lock_guard<std::mutex> lock(mutex_);
  renews_ = renews;
}

void FakeWorkers::AnswerOnce(const v1::SynchronizeResponse& extra) {
  std::lock_guard<std::mutex> lock(mutex_);
  extra_ = extra;
}

grpc::Status FakeWorkers::Synchronize(grpc::ServerContext* context, const v1::SynchronizeRequest* request,
                                      v1::SynchronizeResponse* response) {
  std::unique_lock<std::mutex> lock(mutex_);
  record_.last = *request;
  if (!request->worker().brief()) {
    record_.last_full = *request;
    ++record_.full;
  }
  response->MergeFrom(extra_);
  extra_.Clear();
  ++record_.synchronized;
  record_.longest_unheard_ms = std::max(record_.longest_unheard_ms, request->unheard_ms());
  for (const v1::RunningAttempt& running : request->running()) {
    AddLog(running.log_offset(), running.log());
    record_.notes.insert(record_.notes.end(), running.notes().begin(), running.notes().end());
    record_.phases.insert(running.progress().phase());
  }
  changed_.notify_all();
  if (request->running().empty() && request->free_slots() > 0) {
    auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(500);
    while (grants_.empty() && !context->IsCancelled() && std::chrono::steady_clock::now() < deadline)
      changed_.wait_for(lock, std::chrono::milliseconds(20));
  }
  for (uint32_t i = 0; i < request->free_slots() && !grants_.empty(); ++i) {
    *response->add_grants() = grants_.front();
    grants_.pop_front();
  }
  for (const v1::LeaseToken& token : cancels_) *response->add_cancel() = token;
  response->set_lease_ttl_ms(static_cast<uint32_t>(ttl_.count()));
  response->set_next_synchronize_ms(50);
  response->set_not_renewed(!renews_);
  return grpc::Status::OK;
}

grpc::Status FakeWorkers::CompleteTask(grpc::ServerContext*, const v1::CompleteTaskRequest* request,
                                       v1::CompleteTaskResponse*) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (abort_completes_ || fail_completes_ > 0) {
    --fail_completes_;
    ++record_.refused;
    changed_.notify_all();
    return {abort_completes_ ? grpc::StatusCode::ABORTED : grpc::StatusCode::UNAVAILABLE, "by the test"};
  }
  AddLog(request->log_offset(), request->log());
  record_.notes.insert(record_.notes.end(), request->notes().begin(), request->notes().end());
  record_.completed.push_back(*request);
  changed_.notify_all();
  return grpc::Status::OK;
}

grpc::Status FakeWorkers::CommitCheckpoint(grpc::ServerContext*, const v1::CommitCheckpointRequest* request,
                                           v1::CommitCheckpointResponse*) {
  std::lock_guard<std::mutex> lock(mutex_);
  record_.checkpoints.push_back(*request);
  changed_.notify_all();
  return grpc::Status::OK;
}

FakeCoordinator::FakeCoordinator() { Start(); }
FakeCoordinator::~FakeCoordinator() { Stop(); }

void FakeCoordinator::Start() {
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(address_, grpc::InsecureServerCredentials(), &port);
  builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder.RegisterService(&artifacts);
  builder.RegisterService(&workers);
  server_ = builder.BuildAndStart();
  address_ = "127.0.0.1:" + std::to_string(port);
}

void FakeCoordinator::Stop() {
  if (server_ == nullptr) return;
  server_->Shutdown(std::chrono::system_clock::now());
  server_->Wait();
  server_.reset();
}

}  // namespace refinery::testing
