// common/status.h
//
// Errors of the outside world (files, network, recipes, digests) are absl::Status values. These are the few helpers that
// Debian's abseil 20220623 lacks: macros that pass errors on, and constructors that join their arguments.
//
// A message says what was wrong, where (file, field), and what to do:  "recipe.yaml:7: unknown key 'lern_rate'; did you mean
// 'learning_rate'?"

#pragma once

#include <string>
#include <string_view>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace refinery {

using absl::Status;
using absl::StatusOr;

// absl::StrCat does not take std::string_view with Debian's abseil; this view does.
inline absl::string_view View(std::string_view s) { return {s.data(), s.size()}; }
inline std::string Str(absl::string_view s) { return {s.data(), s.size()}; }

namespace internal {
inline std::string_view Piece(std::string_view s) { return s; }
inline std::string_view Piece(const std::string& s) { return s; }
inline std::string_view Piece(const char* s) { return s; }
inline std::string_view Piece(absl::string_view s) { return {s.data(), s.size()}; }
template <typename T>
  requires std::is_arithmetic_v<T>
std::string Piece(T value) {
  return absl::StrCat(value);
}
}  // namespace internal

// Joins strings of any kind and numbers.
template <typename... Parts>
std::string Join(const Parts&... parts) {
  std::string out;
  ((out += internal::Piece(parts)), ...);
  return out;
}

#define RF_DEFINE_ERROR(Name)                           \
  template <typename... Parts>                          \
  [[nodiscard]] Status Name(const Parts&... parts) {    \
    return absl::Name##Error(View(Join(parts...)));     \
  }
RF_DEFINE_ERROR(InvalidArgument)     // the caller's input is wrong; never retried
RF_DEFINE_ERROR(NotFound)
RF_DEFINE_ERROR(AlreadyExists)
RF_DEFINE_ERROR(FailedPrecondition)
RF_DEFINE_ERROR(DataLoss)            // bytes do not have their digest, a file is truncated
RF_DEFINE_ERROR(ResourceExhausted)   // memory, disk, quota
RF_DEFINE_ERROR(Unavailable)         // try again
RF_DEFINE_ERROR(Aborted)             // stale lease
RF_DEFINE_ERROR(Cancelled)
RF_DEFINE_ERROR(Internal)            // a bug of ours
RF_DEFINE_ERROR(Unimplemented)
RF_DEFINE_ERROR(OutOfRange)
#undef RF_DEFINE_ERROR

inline std::string Message(const Status& status) { return Str(status.message()); }

// The same status with `prefix` before its message.
inline Status Annotate(const Status& status, std::string_view prefix) {
  if (status.ok()) return status;
  return Status(status.code(), View(Join(prefix, ": ", Message(status))));
}

}  // namespace refinery

#define RF_CONCAT_INNER(a, b) a##b
#define RF_CONCAT(a, b) RF_CONCAT_INNER(a, b)

#define RF_RETURN_IF_ERROR(expression)                      \
  do {                                                      \
    ::absl::Status rf_status = (expression);                \
    if (!rf_status.ok()) return rf_status;                  \
  } while (false)

// RF_ASSIGN_OR_RETURN(auto file, Open(path));
#define RF_ASSIGN_OR_RETURN(declaration, expression) \
  RF_ASSIGN_OR_RETURN_IMPL(RF_CONCAT(rf_result_, __LINE__), declaration, expression)
#define RF_ASSIGN_OR_RETURN_IMPL(result, declaration, expression) \
  auto result = (expression);                                     \
  if (!result.ok()) return result.status();                       \
  declaration = *std::move(result)

// A bug if it does not hold: prints and aborts, also in release builds.
#define RF_CHECK(condition) \
  ((condition) ? void() : ::refinery::internal::CheckFailed(#condition, __FILE__, __LINE__))

namespace refinery::internal {
[[noreturn]] void CheckFailed(const char* condition, const char* file, int line);
}
