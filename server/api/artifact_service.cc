#include "server/api/artifact_service.h"

#include <future>

#include "common/grpc_status.h"
#include "common/limits.h"

namespace refinery::api {
namespace {

constexpr int kMaxDigestsPerCall = 10'000;
constexpr std::chrono::seconds kLoopWait{30};

// Runs `command` on the loop and waits until it is committed. (What is dropped at a stop breaks its promise.)
template <typename Command>
Status OnLoop(Coordinator* coordinator, Command command) {
  auto done = std::make_shared<std::promise<Status>>();
  std::future<Status> heard = done->get_future();
  coordinator->Post([done, command](Coordinator::Turn& turn) {
    command(turn);
    turn.replies.push_back([done](const auto&... committed) {
      Status status;
      ((status = committed), ...);
      done->set_value(status);
    });
  });
  done.reset();
  if (heard.wait_for(kLoopWait) != std::future_status::ready) return Unavailable("the coordinator is too busy; try again");
  try {
    return heard.get();
  } catch (const std::future_error&) {
    return Unavailable("the coordinator is stopping");
  }
}

}  // namespace

// A running transfer: counts against the limit and is watched while it lives.
class ArtifactServiceImpl::Transfer {
 public:
  Transfer(ArtifactServiceImpl* service, grpc::ServerContext* context) : service_(service), context_(context) {
    std::lock_guard lock(service_->mutex_);
    admitted_ = service_->transfers_.size() < kMaxTransfers;
    if (admitted_) service_->transfers_[context_] = std::chrono::steady_clock::now();
  }
  ~Transfer() {
    std::lock_guard lock(service_->mutex_);
    if (admitted_) service_->transfers_.erase(context_);
  }
  Status admitted() const {
    if (admitted_) return absl::OkStatus();
    return ResourceExhausted("the coordinator moves ", kMaxTransfers, " blobs already; try again in a moment");
  }
  void Moved() {
    std::lock_guard lock(service_->mutex_);
    service_->transfers_[context_] = std::chrono::steady_clock::now();
  }

 private:
  ArtifactServiceImpl* const service_;
  grpc::ServerContext* const context_;
  bool admitted_ = false;
};

ArtifactServiceImpl::ArtifactServiceImpl(Coordinator* coordinator, security::Gate* gate, std::chrono::milliseconds stall_limit)
    : coordinator_(coordinator), blobs_(&coordinator->blobs()), gate_(gate), stall_limit_(stall_limit),
      watchdog_([this] { Watch(); }) {}

Status ArtifactServiceImpl::LookUp(const std::string& tenant) {
  BlobAccess& access = coordinator_->access();
  RF_RETURN_IF_ERROR(OnLoop(coordinator_, [&access, tenant](Coordinator::Turn& turn) { access.Look(turn.core.state(), tenant); }));
  access.Expand(*blobs_, tenant);
  return absl::OkStatus();
}

StatusOr<bool> ArtifactServiceImpl::MaySee(const security::Principal& principal, const std::string& digest) {
  const std::string& tenant = principal.tenant;
  if (tenant.empty() || coordinator_->access().Knows(tenant, digest)) return true;
  RF_RETURN_IF_ERROR(LookUp(tenant));
  return coordinator_->access().Knows(tenant, digest);
}

Status ArtifactServiceImpl::Own(const security::Principal& principal, const std::string& digest) {
  const std::string& tenant = principal.tenant;
  if (tenant.empty() || coordinator_->access().Knows(tenant, digest)) return absl::OkStatus();
  return OnLoop(coordinator_, [digest, tenant](Coordinator::Turn& turn) { turn.owners.push_back({digest, tenant}); });
}

ArtifactServiceImpl::~ArtifactServiceImpl() {
  {
    std::lock_guard lock(mutex_);
    stopping_ = true;
  }
  wake_.notify_all();
  watchdog_.join();
}

void ArtifactServiceImpl::Watch() {
  std::unique_lock lock(mutex_);
  while (!wake_.wait_for(lock, stall_limit_ / 4, [this] { return stopping_; })) {
    const auto now = std::chrono::steady_clock::now();
    for (const auto& [context, moved] : transfers_) {
      if (now - moved > stall_limit_) context->TryCancel();
    }
  }
}

grpc::Status ArtifactServiceImpl::FindMissingBlobs(grpc::ServerContext* context, const v1::FindMissingBlobsRequest* request,
                                                   v1::FindMissingBlobsResponse* response) {
  const auto call = gate_->Admit(*context, "/refinery.v1.ArtifactService/FindMissingBlobs");
  if (!call.ok()) return ToGrpc(call.status());
  if (request->digests_size() > kMaxDigestsPerCall) {
    return ToGrpc(InvalidArgument("digests has ", request->digests_size(), " entries; at most ", kMaxDigestsPerCall,
                                  " fit into one call"));
  }
  const std::string& tenant = (*call)->principal().tenant;
  bool looked_up = false;  // once is enough for all of them
  for (const std::string& digest : request->digests()) {
    const Status status = blobs_->SizeOf(digest).status();
    if (absl::IsInvalidArgument(status)) return ToGrpc(status);
    const auto is_visible = [&] { return tenant.empty() || coordinator_->access().Knows(tenant, digest); };
    if (status.ok() && !is_visible() && !looked_up) {
      const Status looked = LookUp(tenant);
      if (!looked.ok()) return ToGrpc(looked);
      looked_up = true;
    }
    if (!status.ok() || !is_visible()) response->add_missing(digest);
  }
  return grpc::Status::OK;
}

grpc::Status ArtifactServiceImpl::QueryWriteStatus(grpc::ServerContext* context, const v1::QueryWriteStatusRequest* request,
                                                   v1::QueryWriteStatusResponse* response) {
  const auto call = gate_->Admit(*context, "/refinery.v1.ArtifactService/QueryWriteStatus");
  if (!call.ok()) return ToGrpc(call.status());
  const StatusOr<uint64_t> size = blobs_->SizeOf(request->digest());
  if (absl::IsInvalidArgument(size.status())) return ToGrpc(size.status());
  const security::Principal& principal = (*call)->principal();
  const StatusOr<bool> visible = size.ok() ? MaySee(principal, request->digest()) : false;
  if (!visible.ok()) return ToGrpc(visible.status());
  response->set_complete(*visible);
  response->set_committed_size(*visible ? *size : blobs_->PartialSize(request->digest(), principal.tenant));
  return grpc::Status::OK;
}

grpc::Status ArtifactServiceImpl::WriteBlob(grpc::ServerContext* context, grpc::ServerReader<v1::WriteBlobRequest>* reader,
                                            v1::WriteBlobResponse* response) {
  const auto call = gate_->Admit(*context, "/refinery.v1.ArtifactService/WriteBlob");
  if (!call.ok()) return ToGrpc(call.status());
  Transfer transfer(this, context);
  if (!transfer.admitted().ok()) return ToGrpc(transfer.admitted());
  v1::WriteBlobRequest request;
  if (!reader->Read(&request)) return ToGrpc(InvalidArgument("the first message must name digest and size"));
  const StatusOr<uint64_t> known = blobs_->SizeOf(request.digest());
  if (absl::IsInvalidArgument(known.status())) return ToGrpc(known.status());
  const security::Principal& principal = (*call)->principal();
  const StatusOr<bool> visible = known.ok() ? MaySee(principal, request.digest()) : false;
  if (!visible.ok()) return ToGrpc(visible.status());
  if (*visible) {  // someone else was faster
    response->set_committed_size(*known);
    return grpc::Status::OK;
  }
  StatusOr<std::unique_ptr<store::BlobStore::Upload>> upload =
      blobs_->StartUpload(request.digest(), request.size(), request.offset(), principal.tenant);
  if (!upload.ok()) return ToGrpc(upload.status());
  const std::string digest = request.digest();  // only the first message names it
  do {
    transfer.Moved();
    const Status status = (*upload)->Write(request.offset(), request.data());
    if (!status.ok()) return ToGrpc(status);
    if (!request.finish()) continue;
    Status finished = (*upload)->Finish();
    if (finished.ok()) finished = Own(principal, digest);
    if (finished.ok()) response->set_committed_size((*upload)->committed());
    return ToGrpc(finished);
  } while (reader->Read(&request));
  // The sender went away; what came stays for the next try.
  return ToGrpc(Unavailable("the upload of ", request.digest(), " broke off after ", (*upload)->committed(), " bytes"));
}

grpc::Status ArtifactServiceImpl::ReadBlob(grpc::ServerContext* context, const v1::ReadBlobRequest* request,
                                           grpc::ServerWriter<v1::ReadBlobResponse>* writer) {
  const auto call = gate_->Admit(*context, "/refinery.v1.ArtifactService/ReadBlob");
  if (!call.ok()) return ToGrpc(call.status());
  Transfer transfer(this, context);
  if (!transfer.admitted().ok()) return ToGrpc(transfer.admitted());
  const bool stored = blobs_->IsStored(request->digest());
  const StatusOr<bool> visible = stored ? MaySee((*call)->principal(), request->digest()) : true;
  if (!visible.ok()) return ToGrpc(visible.status());
  if (!*visible) return ToGrpc(NotFound("there is no blob ", request->digest()));
  StatusOr<std::unique_ptr<store::BlobStore::Reader>> reader = blobs_->OpenReader(request->digest(), request->offset());
  if (!reader.ok()) return ToGrpc(reader.status());
  v1::ReadBlobResponse response;
  for (;;) {
    StatusOr<std::string> bytes = (*reader)->Read(limits::kBlobChunkBytes);
    if (!bytes.ok()) return ToGrpc(bytes.status());
    if (bytes->empty()) return grpc::Status::OK;
    response.set_data(*std::move(bytes));
    if (!writer->Write(response)) return ToGrpc(Cancelled("the reader of ", request->digest(), " went away"));
    transfer.Moved();
  }
}

}  // namespace refinery::api
