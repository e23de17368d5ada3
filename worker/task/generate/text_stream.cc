#include "worker/task/generate/text_stream.h"

#include <algorithm>
#include <string_view>

namespace refinery::generate {
namespace {

constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // what decoders write for bytes that are no character (yet)

std::string_view WithoutIncomplete(std::string_view text) {
  while (text.ends_with(kReplacement)) text.remove_suffix(kReplacement.size());
  return text;
}

// The length of the longest end of `text` that `stop` begins with, but for the whole of `stop`.
size_t BeginningAtEnd(std::string_view text, std::string_view stop) {
  for (size_t length = std::min(text.size(), stop.size() - 1); length > 0; --length) {
    if (text.ends_with(stop.substr(0, length))) return length;
  }
  return 0;
}

}  // namespace

std::string StopFinder::Push(const std::string& text) {
  if (stopped_) return "";
  held_ += text;
  size_t first_end = std::string::npos, begin = 0, keep = 0;
  for (const std::string& stop : stops_) {
    if (stop.empty()) continue;
    const size_t found = held_.find(stop);
    if (found != std::string::npos) {
      const size_t end = found + stop.size();
      if (end < first_end || (end == first_end && found < begin)) first_end = end, begin = found;
    }
    keep = std::max(keep, BeginningAtEnd(held_, stop));
  }
  if (first_end != std::string::npos) {
    stopped_ = true;
    return held_.substr(0, begin);
  }
  std::string certain = held_.substr(0, held_.size() - keep);
  held_.erase(0, certain.size());
  return certain;
}

std::string StopFinder::Finish() { return stopped_ ? "" : std::exchange(held_, ""); }

StatusOr<std::string> TextStream::Push(int32_t token) {
  if (stopped()) return std::string();
  window_.push_back(token);
  RF_ASSIGN_OR_RETURN(const std::string text, tokenizer_->Decode(window_));
  const std::string_view whole = WithoutIncomplete(text);
  // Bytes that were a character by themselves and are none together with the next: nothing to add until there is more.
  if (!whole.starts_with(shown_)) return std::string();
  const std::string fresh(whole.substr(shown_.size()));
  shown_ = whole;
  if (whole.size() == text.size() && !fresh.empty()) {
    window_.erase(window_.begin(), window_.begin() + static_cast<std::ptrdiff_t>(last_border_));
    last_border_ = window_.size();
    RF_ASSIGN_OR_RETURN(shown_, tokenizer_->Decode(window_));
  }
  return finder_.Push(fresh);
}

StatusOr<std::string> TextStream::Finish() {
  if (stopped()) return std::string();
  RF_ASSIGN_OR_RETURN(const std::string text, tokenizer_->Decode(window_));
  const std::string rest = text.starts_with(shown_) ? text.substr(shown_.size()) : "";
  shown_ = text;
  std::string certain = finder_.Push(rest);
  return certain + finder_.Finish();
}

}  // namespace refinery::generate
