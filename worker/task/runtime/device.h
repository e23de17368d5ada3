// worker/task/runtime/device.h
//
// The one place from which tensor code takes its device, its compute dtype and its threads.

#pragma once

#include <ATen/core/Tensor.h>

#include <string>

#include "common/status.h"

namespace refinery::runtime {

// cuda:0 where the build has CUDA and a GPU is visible (REFINERY_DEVICE=cpu overrides), else the CPU.
at::Device DefaultDevice();
// "NVIDIA H200, 139 GiB" or "CPU, 2 threads, AVX512_BF16".
std::string DescribeDevice(at::Device device);
// bfloat16 on both kinds.
at::ScalarType ComputeType();
// Intra-operator threads of this process; 0 keeps the environment's choice.
void SetThreads(int threads);
// Tensors of a few megabytes come and go at every step: keeps their pages instead of asking the kernel for zeroed ones each time
// (about a tenth of a training step). Once, at the start of a program.
void KeepFreedPages();
// Peak resident bytes of this process.
uint64_t PeakMemoryBytes();

}  // namespace refinery::runtime
