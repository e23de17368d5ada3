// worker/task/generate/text_stream.h
//
// The text of a growing list of tokens, piece by piece: no piece ends within a character, and none holds text that may turn
// out to be the beginning of a stop string. The pieces joined are the tokenizer's text of all tokens, up to the first stop
// string.
//
// A stop string ends the text as soon as its last character is there, wherever the tokens' borders lie; of two that end at the
// same character the longer one counts.
//
// Threads: one.

#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/tokenizer/tokenizer.h"

namespace refinery::generate {

// Finds stop strings in text that comes in pieces.
class StopFinder {
 public:
  explicit StopFinder(std::vector<std::string> stops) : stops_(std::move(stops)) {}
  // Adds text; returns what is now known not to belong to a stop string. After a stop nothing more comes.
  std::string Push(const std::string& text);
  // What was withheld, when no more text comes.
  std::string Finish();
  bool stopped() const { return stopped_; }

 private:
  std::vector<std::string> stops_;
  std::string held_;
  bool stopped_ = false;
};

class TextStream {
 public:
  TextStream(std::shared_ptr<const tokenizer::Tokenizer> tokenizer, std::vector<std::string> stops)
      : tokenizer_(std::move(tokenizer)), finder_(std::move(stops)) {}
  // The text that the token makes certain; may be empty. INVALID_ARGUMENT for a token that the tokenizer does not know.
  StatusOr<std::string> Push(int32_t token);
  // The rest, when no more tokens come: incomplete characters appear as U+FFFD.
  StatusOr<std::string> Finish();
  bool stopped() const { return finder_.stopped(); }

 private:
  const std::shared_ptr<const tokenizer::Tokenizer> tokenizer_;
  StopFinder finder_;
  // Decoding a token needs those before it (a space may belong to either), but not all: the window begins at the second last
  // place where the text ended with a whole character.
  std::vector<int32_t> window_;
  size_t last_border_ = 0;         // tokens of the window up to the last such place
  std::string shown_;              // text of the window that went to the finder
};

}  // namespace refinery::generate
