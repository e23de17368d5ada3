// worker/agent/machine.h
//
// What this machine has that tasks may ask for: accelerators with model and memory, host memory, room on a disk. And labels, which
// people give.
//
// Source of the accelerators: the driver's own library (libnvidia-ml.so.1), loaded only if it is there; without it /proc names the
// models, and their memory stays unknown (0).
//
// Errors: INVALID_ARGUMENT for labels; what cannot be found out is left out.  Threads: safe for any.

#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "common/status.h"
#include "refinery/v1/job_service.pb.h"

namespace refinery::agent {

// "cuda:0", "cuda:1", ... in the order of the driver, which is that of their bus addresses (CUDA_DEVICE_ORDER=PCI_BUS_ID).
std::vector<v1::Device> Accelerators(const std::filesystem::path& proc = "/proc/driver/nvidia/gpus");

// Fills in host, memory, devices, and the memory of the smallest device (0 without one).
void DescribeMachine(v1::WorkerInfo* info);

// Bytes that an ordinary user may still write there; 0 when that cannot be found out.
uint64_t FreeDiskBytes(const std::filesystem::path& folder);

// {"zone=a", "rack=7"} -> map. A key has 1 to 63 letters, digits, '.', '_', '-' and '/', a value 0 to 63 of them; at most 64 labels,
// no key twice.
StatusOr<std::map<std::string, std::string>> ParseLabels(const std::vector<std::string>& texts);
// The same rules for labels that are a map already, out of a configuration file.
Status CheckLabels(const std::map<std::string, std::string>& labels);

}  // namespace refinery::agent
