#include "client/render/terminal.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>

namespace refinery::client {
namespace {

template <typename... Arguments>
std::string Format(const char* format, Arguments... arguments) {
  char text[64];
  std::snprintf(text, sizeof(text), format, arguments...);
  return text;
}

}  // namespace

bool IsTerminal(int fd) { return ::isatty(fd) == 1; }

int TerminalWidth(int fd) {
  struct winsize size {};
  return ::ioctl(fd, TIOCGWINSZ, &size) == 0 && size.ws_col > 20 ? size.ws_col : 100;
}

bool WantsColor(int fd) {
  const char* no_color = std::getenv("NO_COLOR");
  return (no_color == nullptr || *no_color == '\0') && IsTerminal(fd);
}

std::string Paint(std::string_view text, Color color, bool enabled) {
  static constexpr const char* kCodes[] = {"", "\033[32m", "\033[31m", "\033[33m", "\033[2m", "\033[1m"};
  if (!enabled || color == Color::kPlain) return std::string(text);
  return std::string(kCodes[static_cast<int>(color)]) + std::string(text) + "\033[0m";
}

std::string Printable(std::string_view text) {
  std::string out;
  for (unsigned char c : text) {
    if (c == '\n' || c == '\t' || (c >= 0x20 && c != 0x7f)) out += static_cast<char>(c);
  }
  return out;
}

std::string DurationText(double seconds) {
  if (!(seconds >= 0)) return "?";
  if (seconds < 1) return Format("%.0f ms", seconds * 1000);
  if (seconds < 100) return Format("%.0f s", seconds);
  auto whole = std::llround(seconds);
  if (whole < 3600) return Format("%lldm%02llds", whole / 60, whole % 60);
  return Format("%lldh%02lldm", whole / 3600, whole % 3600 / 60);
}

std::string SizeText(double bytes) {
  static constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  while (bytes >= 1024 && unit < 4) {
    bytes /= 1024;
    ++unit;
  }
  return Format(unit == 0 ? "%.0f %s" : "%.1f %s", bytes, kUnits[unit]);
}

}  // namespace refinery::client
