#include "common/config_file.h"

#include <cstdlib>
#include <memory>
#include <string_view>

#include "common/files.h"
#include "common/yaml_message.h"

namespace refinery {
namespace {

constexpr uint64_t kMaxConfigBytes = 1 << 20;

// MergeFrom would not take over a zero or an empty text that the file says in so many words, e.g. `rate_per_second: 0`.
void ClearWrittenZeros(const YamlPlaces& places, google::protobuf::Message* config) {
  for (const std::string& path : places.written_zeros) {
    google::protobuf::Message* message = config;
    for (std::string_view rest = path; !rest.empty();) {
      const size_t dot = rest.find('.');
      const std::string name(rest.substr(0, dot));
      rest = dot == std::string_view::npos ? std::string_view() : rest.substr(dot + 1);
      const auto* field = message->GetDescriptor()->FindFieldByName(name);
      if (field == nullptr || field->is_repeated()) break;
      if (rest.empty()) {
        message->GetReflection()->ClearField(message, field);
      } else {
        message = message->GetReflection()->MutableMessage(message, field);
      }
    }
  }
}

}  // namespace

std::string ConfigPath(int argc, const char* const* argv, const char* environment) {
  constexpr std::string_view kFlag = "--config";
  std::string path;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (argument == kFlag && i + 1 < argc) path = argv[i + 1];
    if (argument.starts_with(Join(kFlag, "="))) path = argument.substr(kFlag.size() + 1);
  }
  if (path.empty()) {
    if (const char* value = std::getenv(environment)) path = value;
  }
  return path;
}

Status LoadConfig(const std::string& path, google::protobuf::Message* config) {
  RF_ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kMaxConfigBytes));
  const std::unique_ptr<google::protobuf::Message> given(config->New());
  YamlPlaces places;
  RF_RETURN_IF_ERROR(YamlToMessage(text, path, given.get(), &places));
  ClearWrittenZeros(places, config);
  config->MergeFrom(*given);
  return absl::OkStatus();
}

std::string ConfigText(const google::protobuf::Message& config, const std::string& program) {
  return Join("# Configuration of ", program, ", with every default. Flags and environment variables come before this file.\n",
              MessageToYaml(config));
}

}  // namespace refinery
