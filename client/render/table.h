// client/render/table.h
//
// Aligned text columns.

#pragma once

#include <string>
#include <vector>

namespace refinery::client {

// A header and rows of equal length; columns are two blanks apart, the last one is not padded.
std::string TableText(const std::vector<std::string>& header, const std::vector<std::vector<std::string>>& rows);

}  // namespace refinery::client
