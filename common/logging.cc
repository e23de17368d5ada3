#include "common/logging.h"

#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>

#include <cctype>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>

namespace refinery {
namespace {

class JsonFormatter final : public spdlog::formatter {
 public:
  void format(const spdlog::details::log_msg& message, spdlog::memory_buf_t& out) override {
    spdlog::memory_buf_t time;
    time_.format(message, time);
    const auto level = spdlog::level::to_string_view(message.level);
    const std::string line = JsonLogLine(std::string(time.data(), time.size()), std::string(level.data(), level.size()),
                                         std::string(message.logger_name.data(), message.logger_name.size()),
                                         std::string(message.payload.data(), message.payload.size()));
    out.append(line.data(), line.data() + line.size());
  }
  std::unique_ptr<spdlog::formatter> clone() const override { return std::make_unique<JsonFormatter>(); }

 private:
  spdlog::pattern_formatter time_{"%Y-%m-%dT%H:%M:%S.%e%z", spdlog::pattern_time_type::local, ""};
};

bool IsKeyChar(char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_'; }

}  // namespace

std::string JsonLogLine(const std::string& time, const std::string& level, const std::string& program, const std::string& message) {
  nlohmann::ordered_json line = {{"time", time}, {"level", level}, {"program", program}, {"message", message}};
  for (size_t equals = message.find('='); equals != std::string::npos; equals = message.find('=', equals + 1)) {
    size_t begin = equals;
    while (begin > 0 && IsKeyChar(message[begin - 1])) --begin;
    if (begin == equals || (begin > 0 && message[begin - 1] != ' ')) continue;
    const bool quoted = equals + 1 < message.size() && message[equals + 1] == '"';
    const size_t first = equals + (quoted ? 2 : 1);
    const size_t end = std::min(message.find(quoted ? '"' : ' ', first), message.size());
    const std::string key = message.substr(begin, equals - begin);
    if (!line.contains(key)) line[key] = message.substr(first, end - first);
    equals = std::max(equals, end - 1);
  }
  return line.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n";
}

Status InitLogging(const std::string& program, const std::string& level, const std::string& format) {
  static const std::map<std::string, spdlog::level::level_enum> levels = {
      {"trace", spdlog::level::trace}, {"debug", spdlog::level::debug}, {"info", spdlog::level::info},
      {"warn", spdlog::level::warn},   {"error", spdlog::level::err},   {"off", spdlog::level::off}};
  const auto found = levels.find(level);
  if (found == levels.end()) {
    return InvalidArgument("--log-level is '", level, "'; it must be trace, debug, info, warn, error or off");
  }
  if (format != "text" && format != "json") return InvalidArgument("--log-format is '", format, "'; it must be text or json");
  auto logger = std::make_shared<spdlog::logger>(program, std::make_shared<spdlog::sinks::stderr_sink_mt>());
  logger->set_level(found->second);
  if (format == "json") {
    logger->set_formatter(std::make_unique<JsonFormatter>());
  } else {
    logger->set_pattern("%Y-%m-%dT%H:%M:%S.%e%z %^%l%$ %n %v");
  }
  logger->flush_on(spdlog::level::info);
  spdlog::set_default_logger(std::move(logger));
  return absl::OkStatus();
}

}  // namespace refinery
