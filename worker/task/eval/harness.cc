#include "worker/task/eval/harness.h"

#include <charconv>
#include <vector>

#include "worker/task/data/text.h"

namespace refinery::eval {

StatusOr<Harness> HarnessOf(const std::string& version) {
  const std::string plain = version.starts_with("v") ? version.substr(1) : version;
  std::vector<int> numbers;
  for (const std::string& part : data::Split(plain, ".")) {
    int number = 0;
    const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), number);
    if (error != std::errc() || end != part.data() + part.size()) number = -1;
    numbers.push_back(number);
  }
  const bool known = numbers.size() >= 3 && numbers.size() <= 4 && numbers[0] == 0 && numbers[1] == 4 && numbers[2] >= 0 &&
                     (numbers.size() == 3 || numbers[3] >= 0);
  if (!known) {
    return InvalidArgument("'", version, "' is not a release of lm-evaluation-harness whose rules are known; give one of the 0.4 "
                           "series, like 0.4.9.1 or 0.4.13");
  }
  return Harness{.version = plain, .special_tokens = numbers >= std::vector<int>{0, 4, 9, 2}};
}

}  // namespace refinery::eval
