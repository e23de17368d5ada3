// Tests of worker/agent/log_buffer.

#include "worker/agent/log_buffer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace refinery::agent {
namespace {

using ::testing::EndsWith;
using ::testing::HasSubstr;

// Goal: a part that is not acknowledged comes again unchanged, with what was added behind it.
TEST(LogBufferTest, RepeatsWhatIsNotAcknowledged) {
  LogBuffer log(1000, 100'000);
  log.Append("one");
  EXPECT_EQ(log.Peek(100).text, "one\n");
  log.Append("two");
  LogBuffer::Part part = log.Peek(100);
  EXPECT_EQ(part.offset, 0u);
  EXPECT_EQ(part.text, "one\ntwo\n");
  log.Acknowledge(4);
  part = log.Peek(100);
  EXPECT_EQ(part.offset, 4u);
  EXPECT_EQ(part.text, "two\n");
  EXPECT_EQ(log.Peek(2).text, "tw");
}

// Goal: a flood stays bounded, says what it dropped, keeps what was sent and the last line, and offsets have no gap.
TEST(LogBufferTest, DropsOldestUnsentLines) {
  LogBuffer log(1000, 100'000);
  log.Append("first");
  EXPECT_EQ(log.Peek(100).text, "first\n");   // sent, so it must stay
  for (int i = 0; i < 1000; ++i) log.Append("line " + std::to_string(i));
  LogBuffer::Part part = log.Peek(10'000);
  EXPECT_LT(part.text.size(), 1100u);
  EXPECT_EQ(part.text.substr(0, 7), "first\n[");
  EXPECT_THAT(part.text, HasSubstr("bytes of log dropped here"));
  EXPECT_THAT(part.text, EndsWith("line 999\n"));
  log.Acknowledge(part.offset + part.text.size());
  log.Append("last");
  EXPECT_EQ(log.Peek(100).offset, part.text.size());
}

// Goal: an attempt's log ends at its limit, the tail for error messages goes on.
TEST(LogBufferTest, EndsAtItsLimit) {
  LogBuffer log(1000, 200);
  for (int i = 0; i < 100; ++i) log.Append("0123456789");
  EXPECT_LT(log.Peek(10'000).text.size(), 300u);
  EXPECT_THAT(log.Peek(10'000).text, HasSubstr("reached its limit"));
  log.Append("the end");
  EXPECT_THAT(log.Tail(), EndsWith("the end\n"));
}

}  // namespace
}  // namespace refinery::agent
