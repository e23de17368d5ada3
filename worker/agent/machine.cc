#include "worker/agent/machine.h"

#include <dlfcn.h>
#include <sys/sysinfo.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <fstream>
#include <string_view>

#include "common/limits.h"

namespace refinery::agent {
namespace {

constexpr size_t kMaxLabelBytes = 63;

// The few functions of the driver's management library that we need. Their signatures are part of its stable interface.
class ManagementLibrary {
 public:
  ManagementLibrary() {
    library_ = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    ready_ = library_ != nullptr && Find("nvmlInit_v2", &init_) && Find("nvmlShutdown", &shutdown_) &&
             Find("nvmlDeviceGetCount_v2", &count_) && Find("nvmlDeviceGetHandleByIndex_v2", &handle_) &&
             Find("nvmlDeviceGetName", &name_) && Find("nvmlDeviceGetMemoryInfo", &memory_) && init_() == 0;
  }
  ~ManagementLibrary() {
    if (ready_) shutdown_();
    if (library_ != nullptr) dlclose(library_);
  }
  ManagementLibrary(const ManagementLibrary&) = delete;
  ManagementLibrary& operator=(const ManagementLibrary&) = delete;

  std::vector<v1::Device> List() const {
    std::vector<v1::Device> devices;
    unsigned count = 0;
    if (!ready_ || count_(&count) != 0) return devices;
    for (unsigned i = 0; i < count; ++i) {
      v1::Device& device = devices.emplace_back();
      device.set_name(Join("cuda:", i));
      void* handle = nullptr;
      if (handle_(i, &handle) != 0) continue;
      std::array<char, 96> name{};
      if (name_(handle, name.data(), name.size()) == 0) device.set_model(name.data());
      std::array<unsigned long long, 3> memory{};  // NOLINT(google-runtime-int): its type there; total, free, used
      if (memory_(handle, memory.data()) == 0) device.set_memory_bytes(memory[0]);
    }
    return devices;
  }

 private:
  template <typename Function>
  bool Find(const char* name, Function** function) {
    *function = reinterpret_cast<Function*>(dlsym(library_, name));
    return *function != nullptr;
  }

  void* library_ = nullptr;
  bool ready_ = false;
  int (*init_)() = nullptr;
  int (*shutdown_)() = nullptr;
  int (*count_)(unsigned*) = nullptr;
  int (*handle_)(unsigned, void**) = nullptr;
  int (*name_)(void*, char*, unsigned) = nullptr;
  int (*memory_)(void*, void*) = nullptr;
};

// "Model:   NVIDIA H200" in the device's file "information".
std::string ModelIn(const std::filesystem::path& information) {
  std::ifstream file(information);
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with("Model:")) continue;
    const size_t begin = line.find_first_not_of(" \t", 6);
    return begin == std::string::npos ? "" : line.substr(begin);
  }
  return "";
}

bool IsLabelText(std::string_view text) {
  return text.size() <= kMaxLabelBytes && std::all_of(text.begin(), text.end(), [](unsigned char c) {
    return std::isalnum(c) || c == '.' || c == '_' || c == '-' || c == '/';
  });
}

}  // namespace

std::vector<v1::Device> Accelerators(const std::filesystem::path& proc) {
  std::error_code error;
  std::vector<std::filesystem::path> folders;
  for (const auto& entry : std::filesystem::directory_iterator(proc, error)) {
    if (entry.is_directory(error)) folders.push_back(entry.path());
  }
  if (folders.empty()) return {};
  std::sort(folders.begin(), folders.end());  // their names are bus addresses
  std::vector<v1::Device> devices = ManagementLibrary().List();
  if (devices.size() == folders.size()) return devices;
  devices.clear();
  for (const std::filesystem::path& folder : folders) {
    v1::Device& device = devices.emplace_back();
    device.set_name(Join("cuda:", devices.size() - 1));
    device.set_model(ModelIn(folder / "information"));
  }
  return devices;
}

void DescribeMachine(v1::WorkerInfo* info) {
  std::array<char, 256> host{};
  info->set_host(::gethostname(host.data(), host.size() - 1) == 0 ? host.data() : "worker");
  struct sysinfo memory {};
  if (::sysinfo(&memory) == 0) info->set_memory_bytes(static_cast<uint64_t>(memory.totalram) * memory.mem_unit);
  info->add_devices("cpu");
  uint64_t smallest = UINT64_MAX;
  for (v1::Device& device : Accelerators()) {
    info->add_devices(device.name());
    smallest = std::min(smallest, device.memory_bytes());
    *info->add_device_details() = std::move(device);
  }
  info->set_device_memory_bytes(info->device_details().empty() ? 0 : smallest);
}

uint64_t FreeDiskBytes(const std::filesystem::path& folder) {
  std::error_code error;
  const std::filesystem::space_info space = std::filesystem::space(folder, error);
  return error ? 0 : space.available;
}

Status CheckLabels(const std::map<std::string, std::string>& labels) {
  if (labels.size() > limits::kMaxWorkerLabels) {
    return InvalidArgument("there are ", labels.size(), " labels; at most ", limits::kMaxWorkerLabels, " are possible");
  }
  for (const auto& [key, value] : labels) {
    if (!key.empty() && IsLabelText(key) && IsLabelText(value)) continue;
    return InvalidArgument("the label '", key, "=", value, "' must be KEY=VALUE, each at most ", kMaxLabelBytes,
                           " letters, digits, '.', '_', '-' or '/'");
  }
  return absl::OkStatus();
}

StatusOr<std::map<std::string, std::string>> ParseLabels(const std::vector<std::string>& texts) {
  std::map<std::string, std::string> labels;
  for (const std::string& text : texts) {
    const size_t equals = text.find('=');
    if (equals == std::string::npos) return InvalidArgument("the label '", text, "' must be KEY=VALUE");
    const std::string key = text.substr(0, equals);
    if (!labels.emplace(key, text.substr(equals + 1)).second) return InvalidArgument("the label ", key, " is given twice");
  }
  RF_RETURN_IF_ERROR(CheckLabels(labels));
  return labels;
}

}  // namespace refinery::agent
