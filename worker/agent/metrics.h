// worker/agent/metrics.h
//
// What the worker shows at /metrics (Prometheus). Without an address nothing is served, and counting costs nothing much.
//
//   refinery_worker_attempts_total{kind,outcome}  refinery_worker_task_seconds_total{kind}  refinery_worker_running
//   refinery_worker_tokens_trained_total  refinery_worker_tokens_generated_total  refinery_worker_heartbeat_age_seconds
//   refinery_worker_sent_bytes_total  refinery_worker_received_bytes_total  refinery_worker_loss{kind}
//
// Threads: safe for any.

#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "common/status.h"

namespace refinery::agent {

class WorkerMetrics {
 public:
  // `address` is "HOST:PORT" (port 0: any free one) or "none". UNAVAILABLE when the port is in use.
  static StatusOr<std::unique_ptr<WorkerMetrics>> Serve(const std::string& address);
  ~WorkerMetrics();

  void AttemptStarted();
  // outcome: "success", "cancelled", or the failure class in lower case.
  void AttemptEnded(const std::string& kind, const std::string& outcome, double seconds);
  void AddTokens(uint64_t trained, uint64_t generated);
  void SetLoss(const std::string& kind, double loss);
  void AddBytes(uint64_t sent, uint64_t received);
  // The coordinator has answered just now.
  void Heartbeat();
  // The port that is served; 0 without.
  int port() const;

 private:
  struct Impl;
  explicit WorkerMetrics(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace refinery::agent
