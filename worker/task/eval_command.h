// worker/task/eval_command.h
//
// `refinery eval`: scores a model on tasks, alone on this machine, without a job. The client starts it as `refinery-task eval`.
//
// Standard output carries the table (or JSON) and nothing else; progress goes to standard error.

#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "common/status.h"

namespace refinery::task {

struct EvalOptions {
  std::string model;                    // HF folder (float or GPTQ) or GGUF file
  std::vector<std::string> adapters;    // PEFT folders, merged in this order
  std::string compare;                  // a second model, scored on the same items
  std::vector<std::string> compare_adapters;
  std::vector<std::string> tasks;       // names, or task files (*.yaml)
  int64_t shots = -1;                   // -1: none, or what a task file says
  int64_t limit = 0;                    // items per task; 0 = all
  std::string data;                     // pulled benchmarks
  std::string split, pool;              // instead of the official ones
  std::string dtype = "bfloat16";
  int threads = 0;
  int64_t max_length = 0;               // of the input; 0 = the model's
  bool chat_template = false, single_turn = false;
  std::string system;                   // instruction before every prompt
  std::string harness_version = "0.4.13";
  std::string items;                    // folder for one JSONL file a task; empty = none
  std::string output = "text";          // or "json"
  std::string cache;                    // the worker's cache
};

Status RunEvalCommand(const EvalOptions& options);

}  // namespace refinery::task
