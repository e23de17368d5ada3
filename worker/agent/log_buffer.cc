#include "worker/agent/log_buffer.h"

#include <algorithm>

#include "common/status.h"

namespace refinery::agent {
namespace {
constexpr size_t kTailLines = 12;
constexpr size_t kTailLineBytes = 240;
}  // namespace

LogBuffer::LogBuffer(size_t max_pending, size_t max_total) : max_pending_(max_pending), max_total_(max_total) {}

void LogBuffer::Append(std::string_view line) {
  std::lock_guard<std::mutex> lock(mutex_);
  tail_.emplace_back(line.substr(0, kTailLineBytes));
  if (tail_.size() > kTailLines) tail_.pop_front();
  if (base_ + pending_.size() >= max_total_) return;
  pending_ += line.substr(0, max_pending_ / 4);
  pending_ += '\n';
  if (base_ + pending_.size() >= max_total_) {
    pending_ += "[the log of this attempt has reached its limit; the rest is dropped]\n";
    return;
  }
  if (pending_.size() <= max_pending_) return;
  size_t end = pending_.find('\n', std::max(sent_, sent_ + (pending_.size() - sent_) / 2));
  end = end == std::string::npos ? pending_.size() : end + 1;
  dropped_ += end - sent_;
  pending_.erase(sent_, end - sent_);
}

LogBuffer::Part LogBuffer::Peek(size_t max_bytes) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (dropped_ > 0) {
    pending_.insert(sent_, Join("[", dropped_, " bytes of log dropped here]\n"));
    dropped_ = 0;
  }
  size_t size = std::min(pending_.size(), max_bytes);
  sent_ = std::max(sent_, size);
  return {.offset = base_, .text = pending_.substr(0, size)};
}

void LogBuffer::Acknowledge(uint64_t offset) {
  std::lock_guard<std::mutex> lock(mutex_);
  if (offset <= base_) return;
  size_t size = std::min<uint64_t>(offset - base_, sent_);
  pending_.erase(0, size);
  base_ += size;
  sent_ -= size;
}

std::string LogBuffer::Tail() const {
  std::lock_guard<std::mutex> lock(mutex_);
  std::string text;
  for (const std::string& line : tail_) text += line + "\n";
  return text;
}

}  // namespace refinery::agent
