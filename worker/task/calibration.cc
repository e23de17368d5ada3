#include "worker/task/calibration.h"

#include <algorithm>

#include "common/digest.h"
#include "worker/task/data/random.h"

namespace refinery::task {

StatusOr<Calibration> MakeCalibration(const std::vector<data::Example>& examples, const tokenizer::Tokenizer& tokenizer,
                                      int64_t tokens, int64_t sequence_length) {
  if (examples.empty()) return FailedPrecondition("no curated examples to calibrate with: lower the filters of `critique` and `curate`");
  std::vector<std::vector<int32_t>> encoded;
  for (const data::Example& example : examples) {
    std::string prompt = example.input.empty() ? example.instruction : example.instruction + "\n" + example.input;
    RF_ASSIGN_OR_RETURN(std::vector<int32_t> ids, tokenizer.Encode(prompt + " " + example.output + "\n\n"));
    encoded.push_back(std::move(ids));
  }
  int64_t count = std::max<int64_t>(1, tokens / sequence_length);
  Calibration calibration{.examples = static_cast<int64_t>(examples.size())};
  std::vector<int32_t> stream;
  int64_t used = 0;
  for (uint64_t pass = 0; static_cast<int64_t>(stream.size()) < count * sequence_length; ++pass) {
    for (size_t i : data::SeededRandom(DeriveSeed(pass, "calibration")).Permutation(encoded.size())) {
      if (static_cast<int64_t>(stream.size()) >= count * sequence_length) break;
      stream.insert(stream.end(), encoded[i].begin(), encoded[i].end());
      ++used;
    }
  }
  calibration.passes = static_cast<double>(used) / static_cast<double>(encoded.size());
  for (int64_t i = 0; i < count; ++i)
    calibration.sequences.emplace_back(stream.begin() + i * sequence_length, stream.begin() + (i + 1) * sequence_length);
  return calibration;
}

}  // namespace refinery::task
