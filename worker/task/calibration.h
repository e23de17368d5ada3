// worker/task/calibration.h
//
// Calibration tokens for GPTQ out of the job's own curated examples: prompt and answer, shuffled, laid end to end without
// padding and cut into sequences. When the examples are too few they come again in another order, so that each pass shows them
// behind other neighbours; how often is reported.

#pragma once

#include <cstdint>
#include <vector>

#include "common/status.h"
#include "worker/task/data/example.h"
#include "worker/task/tokenizer/tokenizer.h"

namespace refinery::task {

struct Calibration {
  std::vector<std::vector<int32_t>> sequences;  // each of the wanted length
  int64_t examples = 0;                         // distinct
  double passes = 0;                            // over all examples
};

// FAILED_PRECONDITION when there are no examples. Same arguments, same sequences.
StatusOr<Calibration> MakeCalibration(const std::vector<data::Example>& examples, const tokenizer::Tokenizer& tokenizer,
                                      int64_t tokens, int64_t sequence_length);

}  // namespace refinery::task
