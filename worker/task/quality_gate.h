// worker/task/quality_gate.h
//
// The gate of a delivered model: what quantization cost it on the job's held-out examples, and whether that is more than the recipe
// allows (quantize.gptq.max_kl and max_ppl_ratio). Measured in the last task that changes the model.
//
// Threads: pure functions on what they are given.

#pragma once

#include "common/status.h"
#include "worker/task/context.h"
#include "worker/task/quantize/held_out.h"
#include "worker/task/spec.h"
#include "worker/task/tokenizer/tokenizer.h"

namespace refinery::task {

// Examples of the held-out split, of about gate.held_out_tokens together; none where there are none or they are not wanted.
// FAILED_PRECONDITION where there are none and the gate has a bound: a task asks before its work.
StatusOr<quantize::TokenSequences> HeldOutText(const GateSpec& gate, const tokenizer::Tokenizer& tokenizer, const TaskContext& context);

// FAILED_PRECONDITION when `figures` of the model, called `what` ("quantized"), are above a bound.
Status CheckGate(const GateSpec& gate, const quantize::Fidelity& figures, const char* what);

}  // namespace refinery::task
