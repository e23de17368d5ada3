#include "server/report/numbers.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_format.h"

namespace refinery::report {
namespace {

// Decimals that show `value` with `digits` significant ones.
int Decimals(double value, int digits) {
  if (value == 0 || !std::isfinite(value)) return digits - 1;
  return std::clamp(digits - 1 - static_cast<int>(std::floor(std::log10(std::abs(value)))), 0, 12);
}

}  // namespace

std::string Digits(double value, int digits) {
  if (std::abs(value) < 1e-4 && value != 0) return absl::StrFormat("%.*g", digits, value);
  return absl::StrFormat("%.*f", Decimals(value, digits), value);
}

std::string WithError(double value, double standard_error) {
  if (!(standard_error > 0) || !std::isfinite(standard_error)) return Digits(value, 4);
  const int decimals = std::clamp(Decimals(standard_error, 2), 0, 6);
  return absl::StrFormat("%.*f ± %.*f", decimals, value, decimals, standard_error);
}

std::string Megabytes(double bytes) { return absl::StrFormat("%.1f MB", bytes / 1e6); }

std::string Seconds(double seconds) {
  if (seconds < 60) return absl::StrFormat("%.1f s", seconds);
  const auto whole = static_cast<int64_t>(std::llround(seconds));
  if (whole < 3600) return absl::StrFormat("%d min %02d s", whole / 60, whole % 60);
  return absl::StrFormat("%d h %02d min", whole / 3600, whole % 3600 / 60);
}

std::string Count(uint64_t count, const std::string& noun) {
  return absl::StrFormat("%d %s%s", count, noun, count == 1 ? "" : "s");
}

}  // namespace refinery::report
