// tests/support/status_matchers.h
//
// GoogleTest matchers for absl::Status and StatusOr, which Debian's abseil does not have.
//   EXPECT_THAT(Open(path), StatusIs(absl::StatusCode::kNotFound, HasSubstr("recipe.yaml")));
//   ASSERT_THAT(result, IsOk());   EXPECT_THAT(Parse("1"), IsOkAndHolds(1));

#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

#include "common/status.h"

namespace refinery::testing {

inline const absl::Status& StatusOf(const absl::Status& status) { return status; }
template <typename T>
const absl::Status& StatusOf(const absl::StatusOr<T>& result) {
  return result.status();
}

MATCHER(IsOk, negation ? "is not OK" : "is OK") {
  *result_listener << StatusOf(arg).ToString();
  return StatusOf(arg).ok();
}

MATCHER_P(StatusCodeIs, code, "has the wanted status code") {
  *result_listener << StatusOf(arg).ToString();
  return StatusOf(arg).code() == code;
}

MATCHER_P2(StatusIs, code, message, "has the wanted status code and message") {
  *result_listener << StatusOf(arg).ToString();
  return StatusOf(arg).code() == code &&
         ::testing::Matches(message)(std::string(StatusOf(arg).message()));
}

MATCHER_P(IsOkAndHolds, value, "is OK and holds the wanted value") {
  if (!arg.ok()) {
    *result_listener << arg.status().ToString();
    return false;
  }
  return ::testing::ExplainMatchResult(value, *arg, result_listener);
}

}  // namespace refinery::testing
