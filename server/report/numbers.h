// server/report/numbers.h
//
// Numbers as people read them. A value with a standard error shows the error with two digits and the value with as many
// decimals.

#pragma once

#include <cstdint>
#include <string>

namespace refinery::report {

std::string WithError(double value, double standard_error);  // "0.412 ± 0.035"; four digits without an error
std::string Digits(double value, int digits);                // significant ones, never in exponent form above 1e-4
std::string Megabytes(double bytes);                         // "94.7 MB"; 1 MB = 1,000,000 bytes
std::string Seconds(double seconds);                         // "0.8 s", "3 min 05 s", "2 h 07 min"
std::string Count(uint64_t count, const std::string& noun);  // "1 seed", "2 seeds"

}  // namespace refinery::report
