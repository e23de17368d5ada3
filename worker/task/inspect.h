// worker/task/inspect.h
//
// Runs a model on given prompts and writes what it says: greedy tokens and the logits of every prompt position. The parity
// tests compare these with transformers, gptqmodel and peft.

#pragma once

#include <string>
#include <vector>

#include "common/status.h"

namespace refinery::task {

struct InspectOptions {
  std::string model;      // HF folder (float, or GPTQ) or GGUF file
  std::vector<std::string> adapters;  // PEFT folders; several are stacked
  std::string dtype = "float32";
  std::string prompts;    // JSON file: list of strings or of id lists; empty: the model is only loaded
  int max_new_tokens = 64;
  std::string output;     // folder: tokens.json {"model": folder, "prompts": [[...]], "greedy": [[...]]}, logits.safetensors "logits.<i>" [n, V] float32
  std::string cache;
  bool memory = false;    // prints the size of the weights and the process's greatest resident memory until they were loaded
};

Status Inspect(const InspectOptions& options);

}  // namespace refinery::task
