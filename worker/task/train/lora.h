// worker/task/train/lora.h
//
// The trainable LoRA factors of a student: where they start, how they are attached, stored and given back.

#pragma once

#include <string>
#include <vector>

#include "common/status.h"
#include "worker/task/checkpoint/peft_adapter.h"
#include "worker/task/model/causal_lm.h"
#include "worker/task/optim/optimizer.h"

namespace refinery::train {

// Factors beside all linear layers of `student` while the object lives; the student is as before afterwards.
// Threads: none may use the student meanwhile.
class LoraFactors {
 public:
  // PEFT's start: A uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5), B zero; drawn from (seed, module name).
  LoraFactors(model::CausalLm* student, int64_t rank, double lora_alpha, uint64_t seed);
  ~LoraFactors();
  LoraFactors(const LoraFactors&) = delete;
  LoraFactors& operator=(const LoraFactors&) = delete;

  // "<module>.lora_A", "<module>.lora_B" in the order of a forward pass.
  const std::vector<optim::Parameter>& parameters() const { return parameters_; }

  // A copy of the present values, on the CPU.
  checkpoint::PeftAdapter ToAdapter(const std::string& base_model) const;
  // Copies values in. DATA_LOSS when modules or shapes differ.
  Status Load(const checkpoint::PeftAdapter& adapter);

 private:
  std::vector<model::Linear*> linears_;
  std::vector<optim::Parameter> parameters_;  // A then B of each of linears_
  int64_t rank_;
  double lora_alpha_;
};

}  // namespace refinery::train
