#include "worker/task/runtime/device.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <malloc.h>

#include <cstdlib>
#include <cstring>
#include <fstream>
#include <string>

#ifdef REFINERY_CUDA
#include <c10/cuda/CUDAFunctions.h>
#include <cuda_runtime_api.h>
#endif

namespace refinery::runtime {

at::Device DefaultDevice() {
  const char* wanted = std::getenv("REFINERY_DEVICE");
  if (wanted != nullptr && std::strlen(wanted) > 0) return at::Device(std::string(wanted));
#ifdef REFINERY_CUDA
  if (at::hasCUDA() && c10::cuda::device_count() > 0) return at::Device(at::kCUDA, 0);
#endif
  return at::Device(at::kCPU);
}

std::string DescribeDevice(at::Device device) {
#ifdef REFINERY_CUDA
  if (device.is_cuda()) {
    cudaDeviceProp properties{};
    if (cudaGetDeviceProperties(&properties, device.index() < 0 ? 0 : device.index()) == cudaSuccess)
      return Join(properties.name, ", ", static_cast<uint64_t>(properties.totalGlobalMem >> 30), " GiB");
  }
#endif
  return Join(device.str(), ", ", at::get_num_threads(), " threads, ", at::get_cpu_capability());
}

at::ScalarType ComputeType() { return at::kBFloat16; }

void SetThreads(int threads) {
  if (threads > 0) at::set_num_threads(threads);
}

void KeepFreedPages() {
  mallopt(M_MMAP_THRESHOLD, 1 << 30);
  mallopt(M_TRIM_THRESHOLD, 1 << 30);
  mallopt(M_TOP_PAD, 64 << 20);
}

uint64_t PeakMemoryBytes() {
  // Not getrusage: its figure survives exec, so that a program would report the peak of the one that started it.
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);) {
    if (line.starts_with("VmHWM:")) return std::stoull(line.substr(6)) * 1024;
  }
  return 0;
}

}  // namespace refinery::runtime
