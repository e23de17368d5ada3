#include "worker/task/data/rouge.h"

#include <algorithm>

namespace refinery::data {

double RougeLBound(size_t a, size_t b) {
  if (a == 0 || b == 0) return 0;
  return 2.0 * static_cast<double>(std::min(a, b)) / static_cast<double>(a + b);
}

double RougeL(const std::vector<std::string>& a, const std::vector<std::string>& b) {
  if (a.empty() || b.empty()) return 0;
  std::vector<size_t> row(b.size() + 1, 0);
  for (const std::string& word : a) {
    size_t diagonal = 0;
    for (size_t j = 1; j <= b.size(); ++j) {
      const size_t above = row[j];
      row[j] = word == b[j - 1] ? diagonal + 1 : std::max(above, row[j - 1]);
      diagonal = above;
    }
  }
  // With P = L/|a| and R = L/|b|, 2PR/(P+R) is 2L/(|a|+|b|).
  return 2.0 * static_cast<double>(row.back()) / static_cast<double>(a.size() + b.size());
}

}  // namespace refinery::data
