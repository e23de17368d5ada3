// worker/task/inspect.h
//
// Runs a model on given prompts and writes what it says: greedy tokens and the logits of every prompt position. The parity
// tests compare these with transformers, gptqmodel and peft.

#pragma once

#include <string>

#include "common/status.h"

namespace refinery::task {

struct InspectOptions {
  std::string model;      // HF folder (float, or GPTQ) or GGUF file
  std::string adapter;    // PEFT folder, or empty
  std::string dtype = "float32";
  std::string prompts;    // JSON file: list of strings or of id lists
  int max_new_tokens = 64;
  std::string output;     // folder: tokens.json {"model": folder, "prompts": [[...]], "greedy": [[...]]}, logits.safetensors "logits.<i>" [n, V] float32
  std::string cache;
};

Status Inspect(const InspectOptions& options);

}  // namespace refinery::task
