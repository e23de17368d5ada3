// worker/task/distill/tail_grid.h
//
// The teacher's tail at any temperature, from a few numbers per token. The tokens outside the teacher's top K have
// probabilities p_i at temperature 1; at temperature T they weigh sum p_i^(1/T) against p_k^(1/T) of an entry. The
// logit cache stores the tail's log-partition, log sum p_i^b, for the inverse temperatures b below, computed from all
// logits; in between it is interpolated by the polynomial through all of them in log b (barycentric form: Berrut &
// Trefethen 2004, SIAM Review 46(3)).
//
// It is the tail that is interpolated, not the whole vocabulary: where one token is nearly certain, the partition over
// all tokens turns sharply from that token to the crowd at some temperature (errors above 0.05 with this grid), while
// the crowd alone is smooth. The exact entries and the tail together give the whole: over Gaussian and heavy-tailed
// logits with a certain or an uncertain first token its logarithm is right to about 1e-4. A tail never comes out as a
// difference of larger numbers, so none is too small to be seen.
//
// Shapes: n tokens, R tokens of each tail, G grid points.
// Errors: c10::Error for a temperature outside the grid.  Threads: pure functions.

#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <cstdint>
#include <vector>

namespace refinery::distill {

// Chebyshev points of log b over [1/8, 2]; they hold every power of two of the range.
inline constexpr std::array<double, 13> kInverseTemperatures = {
    2, 1.9077, 1.661, 1.3326, 1, 0.7158, 0.5, 0.34926, 0.25, 0.18761, 0.15051, 0.13105, 0.125};
inline constexpr int64_t kGridSize = static_cast<int64_t>(kInverseTemperatures.size());
inline constexpr int64_t kPlainPoint = 4;  // where b = 1
inline constexpr double kMinTemperature = 1 / kInverseTemperatures.front();
inline constexpr double kMaxTemperature = 1 / kInverseTemperatures.back();
static_assert(kInverseTemperatures[kPlainPoint] == 1);

// Weights [G] that bring values at the grid points to `temperature`; one of them is 1 and the others 0 at a grid point.
std::vector<double> TailWeights(double temperature);

// log sum_r exp(b tail[n, r]) for every grid point b, [n, G] float32; -inf where a tail holds nothing.
//   tail [n, R] float32 log-probabilities, -inf allowed
at::Tensor TailLogPartitions(const at::Tensor& tail);

// The tail's log-partition at a temperature, [n] float64.
//   tail_logits          [n]     the same at temperature 1, -inf when there is no tail
//   tail_log_partitions  [n, G]  may be undefined at temperature 1
at::Tensor TailAtTemperature(const at::Tensor& tail_logits, const at::Tensor& tail_log_partitions, double temperature);

}  // namespace refinery::distill
