// worker/task/model/bf16.h
//
// The storage type of bfloat16 in torch-free kernels: bits only, converted by simd.h.

#pragma once

#include <cstdint>

namespace refinery::simd {

struct Bf16 {
  uint16_t bits;
};

}  // namespace refinery::simd
