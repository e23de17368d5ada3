// server/api/requests.h
//
// Request ids: what a caller names a change by, so that repeating the call because its answer was lost does not act twice. A mark
// made here goes into the event log with the change (Core::Once), so a restarted coordinator knows it too.
//
// Errors: INVALID_ARGUMENT for an id that is none.  Threads: no shared state.

#pragma once

#include <string>
#include <string_view>

#include <google/protobuf/message.h>

#include "common/status.h"
#include "refinery/v1/events.pb.h"

namespace refinery::api {

// INVALID_ARGUMENT unless empty or 1 to 64 letters, digits, '-' and '_'.
Status CheckRequestId(const std::string& id);

// The mark of `content`, a request without its id, to `method`; an empty one without an id.
v1::RequestMark MakeMark(const std::string& caller, const std::string& id, std::string_view method,
                         const google::protobuf::Message& content);

template <typename Request>
v1::RequestMark MarkOf(const std::string& caller, std::string_view method, const Request& request) {
  Request content = request;
  content.clear_request_id();
  return MakeMark(caller, request.request_id(), method, content);
}

}  // namespace refinery::api
