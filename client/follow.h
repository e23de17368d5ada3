// client/follow.h
//
// Follows a job to its end over WatchJob, from any sequence number, across restarts of the coordinator.

#pragma once

#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>

#include "client/globals.h"
#include "client/interrupt.h"
#include "common/status.h"
#include "refinery/v1/job_service.pb.h"

namespace refinery::client {

// The events of one job, read on a thread of its own. Reconnects by itself from the last sequence number.
class JobStream {
 public:
  JobStream(std::shared_ptr<grpc::Channel> channel, std::string job, uint64_t after_seq);
  ~JobStream();

  // The next item, or nothing within `wait`.
  std::optional<v1::WatchJobResponse> Next(std::chrono::milliseconds wait);
  // Whether the server has ended the stream because the job is over, and everything was taken.
  bool ended();
  // An error that trying again would not change; OK otherwise.
  Status error();
  // For how long no coordinator has answered.
  std::chrono::milliseconds away();

 private:
  void Loop();

  const std::shared_ptr<grpc::Channel> channel_;
  const std::string job_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<v1::WatchJobResponse> items_;
  grpc::ClientContext* context_ = nullptr;
  uint64_t after_seq_;
  bool ended_ = false;
  bool closing_ = false;
  Status error_;
  std::optional<std::chrono::steady_clock::time_point> away_since_;
  std::thread thread_;
};

struct FollowOptions {
  const Interrupt* interrupt = nullptr;              // CANCELLED when it is raised
  bool json = false;                                 // durable events as JSON lines on standard output, no picture
  uint64_t after_seq = 0;                            // with json: from here on
  std::chrono::milliseconds patience{60'000};        // with a coordinator that does not answer
  std::function<StatusOr<std::string>()> supervise;  // called every tick; a text is shown, an error ends it; may be empty
};

// Returns the job as it ended. CANCELLED when interrupted, UNAVAILABLE when the coordinator stays away.
StatusOr<v1::Job> FollowJob(Connection& connection, const std::string& id, const FollowOptions& options);

}  // namespace refinery::client
