// worker/task/data/text.h
//
// The few string operations in which Python's rules matter, because lm-evaluation-harness builds its prompts with them, and
// the normalised words that novelty, duplicate and contamination checks compare.
//
// Strings are UTF-8; an invalid byte counts as one character and is kept.  Threads: pure functions.

#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace refinery::data {

// str.strip(), lstrip(), rstrip(): also the white space of Unicode (U+00A0, U+2009, ...).
std::string_view Strip(std::string_view text);
std::string_view StripLeft(std::string_view text);
std::string_view StripRight(std::string_view text);

// len(text) in Python: code points, not bytes.
size_t CodePoints(std::string_view text);

// str.capitalize(): the first code point in title case, all others in lower case. Simple case mappings of Unicode, plus the
// German sharp s; the other multi-character mappings are left as they are.
std::string Capitalize(std::string_view text);

// str.lower(), by simple case mappings.
std::string Lower(std::string_view text);

// str.replace(from, to): every occurrence in one pass from the left. `from` must not be empty.
std::string ReplaceAll(std::string_view text, std::string_view from, std::string_view to);

// Lower case, everything that is neither a letter nor a digit becomes a border. ASCII, as Self-Instruct's ROUGE does it; bytes
// of other scripts count as letters, so that such texts are compared and not erased.
std::vector<std::string> Words(std::string_view text);
// Words(text) joined by single spaces: equal for texts that differ in case, punctuation or spacing only.
std::string Normalized(std::string_view text);

// The pieces between separators; "a,,b" has three.
std::vector<std::string> Split(std::string_view text, std::string_view separator);

}  // namespace refinery::data
