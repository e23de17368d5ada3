// worker/agent/log_buffer.h
//
// The log of one attempt on its way to the coordinator: a bounded text with offsets. What was sent stays unchanged until it
// is acknowledged, so that a repeated part is the same part; what was not sent yet loses its oldest lines when there is too
// much of it, and a line says how many bytes went.
//
// Threads: safe for any.

#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <string_view>

namespace refinery::agent {

class LogBuffer {
 public:
  // `max_pending` bytes are held, `max_total` are sent over the life of the attempt.
  LogBuffer(size_t max_pending, size_t max_total);

  // One line, without its end.
  void Append(std::string_view line);

  struct Part {
    uint64_t offset = 0;
    std::string text;
  };
  // The next at most `max_bytes` that are not acknowledged; the same again until Acknowledge.
  Part Peek(size_t max_bytes);
  // Everything before `offset` has arrived.
  void Acknowledge(uint64_t offset);
  // The last lines, joined, for an error message.
  std::string Tail() const;

 private:
  const size_t max_pending_;
  const size_t max_total_;
  mutable std::mutex mutex_;
  uint64_t base_ = 0;             // offset of pending_[0]
  std::string pending_;
  size_t sent_ = 0;               // bytes of pending_ that a Peek has returned
  uint64_t dropped_ = 0;          // bytes that went since the last marker
  std::deque<std::string> tail_;
};

}  // namespace refinery::agent
