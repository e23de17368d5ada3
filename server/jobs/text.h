// server/jobs/text.h
//
// Texts and errors as events carry them: bounded, and never cut inside a character, because a string that is not UTF-8 can be
// written into the log but not read from it again.

#pragma once

#include <string>
#include <string_view>

#include "common/limits.h"
#include "common/status.h"
#include "refinery/v1/task.pb.h"

namespace refinery::jobs {

// The first characters of `text` that fit into `bytes`. `text` is valid UTF-8.
inline std::string Cut(std::string_view text, size_t bytes = limits::kMaxErrorBytes) {
  if (text.size() <= bytes) return std::string(text);
  while (bytes > 0 && (static_cast<unsigned char>(text[bytes]) & 0xC0) == 0x80) --bytes;
  return std::string(text.substr(0, bytes));
}

inline v1::TaskError MakeError(v1::FailureClass failure_class, absl::StatusCode code, std::string_view message) {
  v1::TaskError error;
  error.set_failure_class(failure_class);
  error.set_code(static_cast<int>(code));
  error.set_message(Cut(message));
  return error;
}

}  // namespace refinery::jobs
