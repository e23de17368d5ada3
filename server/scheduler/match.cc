#include "server/scheduler/match.h"

#include <algorithm>
#include <map>

#include "absl/strings/str_format.h"
#include "common/status.h"

namespace refinery::scheduler {
namespace {

std::string Gib(uint64_t bytes) { return absl::StrFormat("%.3g GiB", static_cast<double>(bytes) / (1 << 30)); }

}  // namespace

bool CanNow(const v1::WorkerInfo* worker, const Used& used, const v1::Requirements& needs) {
  if (worker == nullptr) {
    return needs.devices() == 0 && needs.memory_bytes() == 0 && needs.disk_bytes() == 0 && needs.labels().empty();
  }
  if (needs.devices() > 0) {
    const auto fitting = std::count_if(worker->devices().begin(), worker->devices().end(), [&](const std::string& name) {
      return needs.device().empty() || name.find(needs.device()) != std::string::npos;
    });
    if (fitting < static_cast<int64_t>(used.devices) + needs.devices()) return false;
    if (worker->device_memory_bytes() < needs.device_memory_bytes()) return false;
  }
  if (needs.memory_bytes() > 0 && worker->memory_bytes() < used.memory_bytes + needs.memory_bytes()) return false;
  if (worker->free_disk_bytes() < needs.disk_bytes()) return false;
  return std::all_of(needs.labels().begin(), needs.labels().end(), [&](const auto& label) {
    const auto found = worker->labels().find(label.first);
    return found != worker->labels().end() && found->second == label.second;
  });
}

bool CanEver(const v1::WorkerInfo* worker, const v1::Requirements& needs) { return CanNow(worker, {}, needs); }

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
