// server/api/artifact_service.h
//
// ArtifactService (proto/refinery/v1/artifact_service.proto) over the blob store. Blobs mean file reads, writes and syncs, so
// these calls run in gRPC's own threads, one a transfer, apart from the coordinator's loop. Two things keep those threads
// bounded: at most kMaxTransfers at a time (RESOURCE_EXHAUSTED beyond), and a transfer whose peer is silent for kStallLimit is
// cancelled.
//
// A caller of one tenant sees the blobs of that tenant only (blob_access.h); to all other ones the answer is that there is no such blob.
//
// Threads: any.

#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>

#include "refinery/v1/artifact_service.grpc.pb.h"
#include "server/api/coordinator.h"
#include "server/security/gate.h"
#include "server/store/blob_store.h"

namespace refinery::api {

class ArtifactServiceImpl final : public v1::ArtifactService::Service {
 public:
  static constexpr int kMaxTransfers = 64;

  ArtifactServiceImpl(Coordinator* coordinator, security::Gate* gate,
                      std::chrono::milliseconds stall_limit = std::chrono::minutes(1));
  ~ArtifactServiceImpl() override;

  grpc::Status FindMissingBlobs(grpc::ServerContext* context, const v1::FindMissingBlobsRequest* request,
                                v1::FindMissingBlobsResponse* response) override;
  grpc::Status QueryWriteStatus(grpc::ServerContext* context, const v1::QueryWriteStatusRequest* request,
                                v1::QueryWriteStatusResponse* response) override;
  grpc::Status WriteBlob(grpc::ServerContext* context, grpc::ServerReader<v1::WriteBlobRequest>* reader,
                         v1::WriteBlobResponse* response) override;
  grpc::Status ReadBlob(grpc::ServerContext* context, const v1::ReadBlobRequest* request,
                        grpc::ServerWriter<v1::ReadBlobResponse>* writer) override;

 private:
  class Transfer;
  // Cancels transfers that do not move.
  void Watch();
  // Whether a caller may know of the blob, wherever it is. UNAVAILABLE when the loop does not answer.
  StatusOr<bool> MaySee(const security::Principal& principal, const std::string& digest);
  // Looks up what the tenant's jobs refer to by now: one turn of the loop.
  Status LookUp(const std::string& tenant);
  // The blob is the caller's from now on, durably.
  Status Own(const security::Principal& principal, const std::string& digest);

  Coordinator* const coordinator_;
  store::BlobStore* const blobs_;
  security::Gate* const gate_;
  const std::chrono::milliseconds stall_limit_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::map<grpc::ServerContext*, std::chrono::steady_clock::time_point> transfers_;  // call -> when it last moved
  bool stopping_ = false;
  std::thread watchdog_;
};

}  // namespace refinery::api
