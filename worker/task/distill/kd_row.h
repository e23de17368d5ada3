// worker/task/distill/kd_row.h
//
// The inner kernel of the distillation loss on the CPU: one answer position, from its logits to its loss and, in
// place, to the gradient of that loss with respect to the logits. Plain loops that the compiler turns into vector
// code; no torch.
//
// Shapes: V vocabulary, K teacher entries.  Dtypes: logits bfloat16 (as raw bits) or float32; maths float32, sums
// double.
// Errors: none; ids and target must lie in [0, V).  Threads: rows are independent.

#pragma once

#include <cstdint>

namespace refinery::distill {

// The teacher's side of one position.
struct TeacherRow {
  const int32_t* ids = nullptr;   // [K], distinct
  const float* logits = nullptr;  // [K] log-probabilities at temperature 1
  double tail = 0;                // log of sum p^(1/T) over the tokens outside them (tail_grid.h), -inf when none
  int64_t entries = 0;            // K; 0 = no teacher
};

struct RowSettings {
  int64_t vocabulary = 0;
  double temperature = 1;
  double kl_weight = 0;             // of KL_T in the gradient, T^2 and normalizer included
  double cross_entropy_weight = 0;  // of the cross-entropy in the gradient, normalizer included
  bool gradient = true;             // false: leave the logits as they are
};

struct RowResult {
  double kl = 0;             // KL_T(teacher || student), >= 0
  double cross_entropy = 0;  // -log softmax(logits)[target], at temperature 1
};

// The teacher's probabilities at a temperature: of the K entries one by one, of the rest together.
struct TeacherDistribution {
  double* log_probabilities = nullptr;  // [K], caller's memory
  double tail_log_probability = 0;
};
void TeacherAtTemperature(const TeacherRow& teacher, double temperature, TeacherDistribution* out);

// scratch: `vocabulary` floats and 2 K doubles of the calling thread.
RowResult KdRow(uint16_t* bfloat16_logits, const TeacherRow& teacher, int32_t target, const RowSettings& settings,
                float* scratch, double* teacher_scratch);
RowResult KdRow(float* logits, const TeacherRow& teacher, int32_t target, const RowSettings& settings, float* scratch,
                double* teacher_scratch);

}  // namespace refinery::distill
