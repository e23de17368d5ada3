#include "server/scheduler/match.h"

#include <algorithm>
#include <map>

#include "absl/strings/str_format.h"
#include "common/status.h"

namespace refinery::scheduler {
namespace {

constexpr char kProcessor[] = "cpu";

std::string Gib(uint64_t bytes) { return absl::StrFormat("%.3g GiB", static_cast<double>(bytes) / (1 << 30)); }

// Devices of the worker that are of the wanted model and have the wanted memory. Workers that do not tell models say the memory of
// the smallest device.
uint64_t FittingDevices(const v1::WorkerInfo& worker, const v1::Requirements& needs) {
  const auto names = [&](const std::string& name) {
    return needs.device().empty() ? name != kProcessor : name.find(needs.device()) != std::string::npos;
  };
  if (worker.device_details().empty() || needs.device() == kProcessor) {
    if (worker.device_memory_bytes() < needs.device_memory_bytes()) return 0;
    return static_cast<uint64_t>(std::count_if(worker.devices().begin(), worker.devices().end(), names));
  }
  return static_cast<uint64_t>(
      std::count_if(worker.device_details().begin(), worker.device_details().end(), [&](const v1::Device& device) {
        return (names(device.name()) || names(device.model())) && device.memory_bytes() >= needs.device_memory_bytes();
      }));
}

bool HasLabel(const v1::WorkerInfo& worker, const std::string& key, const std::string& value) {
  const auto found = worker.labels().find(key);
  return found != worker.labels().end() && found->second == value;
}

// Without a sum: what jobs ask for may be any number.
bool HasLeft(uint64_t all, uint64_t used, uint64_t needed) { return all >= used && all - used >= needed; }

std::string Lack(size_t count, std::string_view lacks, std::string_view lack) {
  return Join(count, count == 1 ? " " : " of them ", count == 1 ? lacks : lack);
}

}  // namespace

bool HasAccelerators(const v1::WorkerInfo* worker) {
  return worker != nullptr &&
         std::any_of(worker->devices().begin(), worker->devices().end(), [](const std::string& name) { return name != kProcessor; });
}

bool NeedsAccelerators(const v1::Requirements& needs) { return needs.devices() > 0 && needs.device() != kProcessor; }

bool CanNow(const v1::WorkerInfo* worker, const Used& used, const v1::Requirements& needs) {
  if (worker == nullptr) {
    return needs.devices() == 0 && needs.memory_bytes() == 0 && needs.disk_bytes() == 0 && needs.labels().empty();
  }
  return (needs.devices() == 0 || HasLeft(FittingDevices(*worker, needs), used.devices, needs.devices())) &&
         (needs.memory_bytes() == 0 || HasLeft(worker->memory_bytes(), used.memory_bytes, needs.memory_bytes())) &&
         worker->free_disk_bytes() >= needs.disk_bytes() &&
         std::all_of(needs.labels().begin(), needs.labels().end(),
                     [&](const auto& label) { return HasLabel(*worker, label.first, label.second); });
}

bool CanEver(const v1::WorkerInfo* worker, const v1::Requirements& needs) { return CanNow(worker, {}, needs); }

uint64_t MostAtOnce(const v1::WorkerInfo* worker, const v1::Requirements& needs, uint64_t slots) {
  if (!CanEver(worker, needs)) return 0;
  if (needs.devices() > 0) slots = std::min(slots, FittingDevices(*worker, needs) / needs.devices());
  if (needs.memory_bytes() > 0) slots = std::min(slots, worker->memory_bytes() / needs.memory_bytes());
  return slots;
}

std::string WhyNone(const std::vector<const v1::WorkerInfo*>& workers, const v1::Requirements& needs) {
  size_t unknown = 0, devices = 0, memory = 0, disk = 0;
  uint64_t most_devices = 0, most_memory = 0, most_disk = 0;
  std::map<std::string, size_t> labels;
  for (const v1::WorkerInfo* worker : workers) {
    if (worker == nullptr) {
      ++unknown;
      continue;
    }
    const uint64_t fitting = FittingDevices(*worker, needs);
    devices += fitting < needs.devices();
    memory += worker->memory_bytes() < needs.memory_bytes();
    disk += worker->free_disk_bytes() < needs.disk_bytes();
    most_devices = std::max(most_devices, fitting);
    most_memory = std::max(most_memory, worker->memory_bytes());
    most_disk = std::max(most_disk, worker->free_disk_bytes());
    for (const auto& [key, value] : needs.labels()) {
      if (!HasLabel(*worker, key, value)) ++labels[Join(key, "=", value)];
    }
  }
  std::string text;
  const auto add = [&](size_t count, const std::string& part) {
    if (count > 0) text += (text.empty() ? "" : ", ") + part;
  };
  add(devices, Join(Lack(devices, "has", "have"), " too few such devices (at most ", most_devices, ")"));
  add(memory, Join(Lack(memory, "has", "have"), " too little memory (at most ", Gib(most_memory), ")"));
  add(disk, Join(Lack(disk, "has", "have"), " too little free disk (at most ", Gib(most_disk), ")"));
  for (const auto& [label, count] : labels) add(count, Join(Lack(count, "lacks", "lack"), " the label ", label));
  add(unknown, Join(Lack(unknown, "has", "have"), " not said yet what it has"));
  return text;
}

std::string Describe(const v1::Requirements& needs) {
  std::string text;
  const auto add = [&](const std::string& part) { text += (text.empty() ? "" : ", ") + part; };
  if (needs.devices() > 0) {
    add(Join(needs.devices(), needs.devices() == 1 ? " device" : " devices", needs.device().empty() ? "" : " ", needs.device(),
             needs.device_memory_bytes() > 0 ? " with " + Gib(needs.device_memory_bytes()) : ""));
  }
  if (needs.memory_bytes() > 0) add(Gib(needs.memory_bytes()) + " memory");
  if (needs.disk_bytes() > 0) add(Gib(needs.disk_bytes()) + " free disk");
  const std::map<std::string, std::string> labels(needs.labels().begin(), needs.labels().end());
  for (const auto& [name, value] : labels) add(Join("label ", name, "=", value));
  return text.empty() ? "any worker" : text;
}

}  // namespace refinery::scheduler
