// worker/task/chat.h
//
// `refinery chat`: a conversation in the terminal, or one answer in a pipe. The client starts it as `refinery-task chat`.
//
// Standard output carries the answers and nothing else where it is no terminal; remarks and errors go to standard error.
// Ctrl-C stops an answer; at the prompt a second one leaves. Errors: those of loading a model, and of a single answer.

#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "common/status.h"

namespace refinery::task {

struct ChatOptions {
  std::string model;                    // HF folder (float or GPTQ) or GGUF file
  std::vector<std::string> adapters;    // PEFT folders, merged in this order
  std::string dtype = "bfloat16";
  int threads = 0;                      // 0 = all cores
  std::string system;
  std::optional<std::string> prompt;    // one answer to it, then the end; nothing is read
  std::string json_schema;              // file
  // Where absent: the model's generation_config.json, then temperature 0.7 and top_p 0.95.
  std::optional<double> temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
  std::optional<int64_t> top_k;
  std::optional<uint64_t> seed;         // absent: another one each time
  int64_t max_new_tokens = 1024;
  int64_t context = 0;                  // tokens; 0 = what the model takes, up to 8192
  int64_t memory_mib = 0;               // of the key-value cache; 0 = no bound
  bool verbose = false;                 // tokens and times after each answer
  std::string cache;
};

// The exit code: 0, or 130 after Ctrl-C.
StatusOr<int> Chat(const ChatOptions& options);

}  // namespace refinery::task
