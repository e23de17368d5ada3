// tests/support/fake_coordinator.h
//
// A coordinator for tests of its clients: an artifact store in memory that can cut transfers, and a WorkerService that hands
// out scripted leases and records what workers report. Written for the tests only; it decides nothing.
//
// Threads: safe for any.

#pragma once

#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "refinery/v1/artifact_service.grpc.pb.h"
#include "refinery/v1/worker_service.grpc.pb.h"

namespace refinery::testing {

class FakeArtifacts final : public v1::ArtifactService::Service {
 public:
  // Every write or read ends UNAVAILABLE after this many bytes; 0 = never. Counted down by `cuts`.
  void CutAfter(uint64_t bytes, int cuts);
  // The next `times` writes and reads end with this before anything has moved.
  void Refuse(const grpc::Status& status, int times);
  // How many of them are still to come.
  int refusals_left();
  // Changes one byte of what is read from now on.
  void CorruptReads(bool corrupt);
  std::map<std::string, std::string> blobs();
  std::string Put(const std::string& bytes);
  // Stores a folder artifact and returns its digest.
  std::string PutFolder(const std::map<std::string, std::string>& files);
  // The files of an artifact; empty if it is not whole.
  std::map<std::string, std::string> Folder(const std::string& digest);
  uint64_t bytes_written();

  grpc::Status FindMissingBlobs(grpc::ServerContext*, const v1::FindMissingBlobsRequest* request,
                                v1::FindMissingBlobsResponse* response) override;
  grpc::Status QueryWriteStatus(grpc::ServerContext*, const v1::QueryWriteStatusRequest* request,
                                v1::QueryWriteStatusResponse* response) override;
  grpc::Status WriteBlob(grpc::ServerContext*, grpc::ServerReader<v1::WriteBlobRequest>* reader,
                         v1::WriteBlobResponse* response) override;
  grpc::Status ReadBlob(grpc::ServerContext*, const v1::ReadBlobRequest* request,
                        grpc::ServerWriter<v1::ReadBlobResponse>* writer) override;

 private:
  bool TakeCut(uint64_t moved);
  grpc::Status TakeRefusal();

  std::mutex mutex_;
  std::map<std::string, std::string> blobs_;
  std::map<std::string, std::string> partial_;
  uint64_t cut_after_ = 0;
  int cuts_ = 0;
  grpc::Status refusal_;
  int refusals_ = 0;
  bool corrupt_ = false;
  uint64_t bytes_written_ = 0;
};

class FakeWorkers final : public v1::WorkerService::Service {
 public:
  void Grant(const v1::Lease& lease);
  void CancelLease(const v1::LeaseToken& token);
  void SetLeaseTtl(std::chrono::milliseconds ttl);
  // Whether answers renew the leases, as they do at first.
  void SetRenews(bool renews);
  // How often CompleteTask answers UNAVAILABLE before it works, or ABORTED for ever.
  void FailCompletes(int times);
  // The next Synchronize is answered with this beside everything else: tell_worker, repeat_report.
  void AnswerOnce(const v1::SynchronizeResponse& extra);
  void AbortCompletes();

  // Waits until `done` holds for what was recorded; false after ten seconds.
  struct Record {
    std::vector<v1::CompleteTaskRequest> completed;
    std::vector<v1::CommitCheckpointRequest> checkpoints;
    v1::SynchronizeRequest last;
    v1::SynchronizeRequest last_full;      // the last that was not brief about the worker
    int full = 0;
    std::string log;                       // parts joined by offset, over Synchronize and CompleteTask
    std::vector<v1::Note> notes;
    std::set<std::string> phases;
    int synchronized = 0;
    uint32_t longest_unheard_ms = 0;       // that a Synchronize named
    int refused = 0;                       // completes answered with an error
  };
  bool WaitFor(const std::function<bool(const Record&)>& done, std::chrono::seconds wait = std::chrono::seconds(10));
  Record record();

  grpc::Status Synchronize(grpc::ServerContext* context, const v1::SynchronizeRequest* request,
                           v1::SynchronizeResponse* response) override;
  grpc::Status CompleteTask(grpc::ServerContext*, const v1::CompleteTaskRequest* request,
                            v1::CompleteTaskResponse*) override;
  grpc::Status CommitCheckpoint(grpc::ServerContext*, const v1::CommitCheckpointRequest* request,
                                v1::CommitCheckpointResponse*) override;

 private:
  void AddLog(uint64_t offset, const std::string& text);

  std::mutex mutex_;
  std::condition_variable changed_;
  Record record_;
  std::deque<v1::Lease> grants_;
  std::vector<v1::LeaseToken> cancels_;
  std::chrono::milliseconds ttl_{30'000};
  int fail_completes_ = 0;
  bool abort_completes_ = false;
  bool renews_ = true;
  v1::SynchronizeResponse extra_;
};

// Both services on a loopback port that survives Stop and Start.
class FakeCoordinator {
 public:
  FakeCoordinator();
  ~FakeCoordinator();
  void Start();
  void Stop();
  const std::string& address() const { return address_; }

  FakeArtifacts artifacts;
  FakeWorkers workers;

 private:
  std::string address_ = "127.0.0.1:0";
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace refinery::testing
