#include "worker/task/runtime/device.h"

#include <ATen/ATen.h>
#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <ATen/Version.h>
#include <sys/resource.h>

#include <cstdlib>
#include <cstring>

#ifdef REFINERY_CUDA
#include <ATen/cuda/CUDAContext.h>
#endif

namespace refinery::runtime {

at::Device DefaultDevice() {
  const char* wanted = std::getenv("REFINERY_DEVICE");
  if (wanted != nullptr && std::strlen(wanted) > 0) return at::Device(std::string(wanted));
#ifdef REFINERY_CUDA
  if (at::hasCUDA() && at::cuda::device_count() > 0) return at::Device(at::kCUDA, 0);
#endif
  return at::Device(at::kCPU);
}

std::string DescribeDevice(at::Device device) {
#ifdef REFINERY_CUDA
  if (device.is_cuda()) {
    const cudaDeviceProp* p = at::cuda::getDeviceProperties(device.index() < 0 ? 0 : device.index());
    return Join(p->name, ", ", static_cast<uint64_t>(p->totalGlobalMem >> 30), " GiB");
  }
#endif
  return Join(device.str(), ", ", at::get_num_threads(), " threads, ", at::get_cpu_capability());
}

at::ScalarType ComputeType() { return at::kBFloat16; }

void SetThreads(int threads) {
  if (threads > 0) at::set_num_threads(threads);
}

uint64_t PeakMemoryBytes() {
  rusage usage{};
  getrusage(RUSAGE_SELF, &usage);
  return static_cast<uint64_t>(usage.ru_maxrss) * 1024;
}

}  // namespace refinery::runtime
