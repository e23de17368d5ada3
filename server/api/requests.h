// server/api/requests.h
//
// Remembers the changes that were asked for with a request id, so that a call that is repeated because its answer was lost does not
// act twice: a late second "pause" must not undo the "resume" in between. CreateJob is remembered for good, in the event log; these
// calls say which state is wanted, so it is enough to remember them while the process lives, for a day at most.
//
// Threads: the coordinator's loop.

#pragma once

#include <chrono>
#include <deque>
#include <string>
#include <string_view>
#include <unordered_map>

#include <google/protobuf/message.h>

#include "common/status.h"

namespace refinery::api {

// INVALID_ARGUMENT unless empty or 1 to 64 letters, digits, '-' and '_'.
Status CheckRequestId(const std::string& id);

class Requests {
 public:
  static constexpr size_t kMaxRequests = 100'000;
  static constexpr std::chrono::hours kMaxAge{24};

  // Whether `request` of `caller` to `method` was done before; ALREADY_EXISTS when its id stands for another one. A request without an id was
  // never done before.
  StatusOr<bool> WasDone(const std::string& caller, std::string_view method, const google::protobuf::Message& request,
                         const std::string& id, std::chrono::milliseconds now);
  void Remember(const std::string& caller, std::string_view method, const google::protobuf::Message& request,
                const std::string& id, std::chrono::milliseconds now);

 private:
  struct Entry {
    std::string key;
    std::chrono::milliseconds time{0};
  };
  std::unordered_map<std::string, std::string> content_;  // "<caller>/<id>" -> digest of the request
  std::deque<Entry> oldest_;
};

}  // namespace refinery::api
