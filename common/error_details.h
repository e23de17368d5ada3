// common/error_details.h
//
// What an error says to programs beside its sentence: a reason code, the field of the request that is wrong, when to try again,
// which thing was not found. The details are payloads of an absl::Status and cross the wire as proto/refinery/v1/error.proto
// says; common/grpc_status.h carries them over.
//
//   return WithField(InvalidArgument("page_size must not be negative"), "page_size");
//   return WithRetryAfter(WithReason(ResourceExhausted("too many calls"), "RATE_LIMITED"), 500ms);
//
// An error whose sentence begins with a code ("STALE_LEASE: ...") needs no WithReason. OK statuses stay as they are.
// Threads: no shared state.

#pragma once

#include <chrono>
#include <map>
#include <optional>
#include <string>
#include <string_view>

#include "common/status.h"

namespace refinery {

Status WithReason(Status status, std::string_view reason, const std::map<std::string, std::string>& metadata = {});
// `field` of the request ("recipe.distill.temperature") is what the sentence is about.
Status WithField(Status status, std::string_view field);
Status WithRetryAfter(Status status, std::chrono::milliseconds delay);
// `type` is "job", "worker", "tenant" or "blob".
Status WithResource(Status status, std::string_view type, std::string_view name);

// Empty or nothing when the status does not say. Every error has a reason: without a better one the name of its code.
std::string ReasonOf(const Status& status);
bool HasReason(const Status& status);          // whether WithReason gave one
std::string FieldOf(const Status& status);
std::string ResourceOf(const Status& status);  // "job/x"
std::optional<std::chrono::milliseconds> RetryAfterOf(const Status& status);

}  // namespace refinery
