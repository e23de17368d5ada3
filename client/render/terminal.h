// client/render/terminal.h
//
// What the standard streams can show.

#pragma once

#include <string>
#include <string_view>

namespace refinery::client {

bool IsTerminal(int fd);
// Columns of the terminal at `fd`; 100 if it does not say.
int TerminalWidth(int fd);
// Whether colours are wanted there (a terminal, and NO_COLOR is not set).
bool WantsColor(int fd);

enum class Color { kPlain, kGreen, kRed, kYellow, kDim, kBold };
// `text` in a colour, or as it is.
std::string Paint(std::string_view text, Color color, bool enabled);

// Text from outside without control characters that could steer a terminal; line ends and tabs stay.
std::string Printable(std::string_view text);

// "950 ms", "12 s", "3m05s", "2h07m".
std::string DurationText(double seconds);
// "512 B", "1.5 KiB", "98.0 MiB".
std::string SizeText(double bytes);

}  // namespace refinery::client
