// worker/task/data/rouge.h
//
// ROUGE-L as Self-Instruct uses it for novelty: F = 2PR / (P + R), P = LCS / |a|, R = LCS / |b|, over words in lower case
// without punctuation and without stemming.  Source: Lin 2004; github.com/yizhongw/self-instruct.  Threads: pure functions.

#pragma once

#include <string>
#include <vector>

namespace refinery::data {

// 0 when either is empty.
double RougeL(const std::vector<std::string>& a, const std::vector<std::string>& b);

// An upper bound of RougeL that costs no alignment: the LCS is at most the shorter length.
double RougeLBound(size_t a, size_t b);

}  // namespace refinery::data
