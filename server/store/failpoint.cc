#include "server/store/failpoint.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <string>

namespace refinery::store {
namespace {

struct Setting {
  std::string name;
  uint64_t count = 1;
};

const Setting& TheSetting() {
  static const Setting setting = [] {
    Setting read;
    const char* text = std::getenv("REFINERY_FAILPOINT");
    if (text == nullptr) return read;
    read.name = text;
    const size_t colon = read.name.find(':');
    if (colon != std::string::npos) {
      read.count = std::max<uint64_t>(1, std::strtoull(read.name.c_str() + colon + 1, nullptr, 10));
      read.name.resize(colon);
    }
    return read;
  }();
  return setting;
}

bool IsKnown(std::string_view name) { return std::find(kFailpoints.begin(), kFailpoints.end(), name) != kFailpoints.end(); }

}  // namespace

Status CheckFailpointSetting() {
  const std::string& name = TheSetting().name;
  if (name.empty() || IsKnown(name)) return absl::OkStatus();
  std::string names;
  for (const std::string_view known : kFailpoints) names += Join(names.empty() ? "" : ", ", known);
  return InvalidArgument("REFINERY_FAILPOINT: there is no failpoint '", name, "'; there are ", names);
}

void Failpoint(std::string_view name) {
  static std::atomic<uint64_t> hits{0};
  const Setting& setting = TheSetting();
  if (setting.name.empty()) return;
  RF_CHECK(IsKnown(name));
  if (name == setting.name && ++hits >= setting.count) _exit(137);
}

}  // namespace refinery::store
