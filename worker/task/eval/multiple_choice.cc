#include "worker/task/eval/multiple_choice.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "worker/task/data/text.h"

namespace refinery::eval {
namespace {

int64_t ArgMax(const std::vector<double>& values) {
  return std::max_element(values.begin(), values.end()) - values.begin();
}

ItemResult Judge(const data::MultipleChoiceItem& item, int64_t row, const data::Score* scores) {
  ItemResult result{.row = row, .gold = item.gold};
  std::vector<double> normalized;
  for (size_t choice = 0; choice < item.continuations.size(); ++choice) {
    result.log_likelihoods.push_back(scores[choice].log_likelihood);
    result.tokens.push_back(scores[choice].tokens);
    normalized.push_back(scores[choice].log_likelihood / static_cast<double>(data::CodePoints(item.choices[choice])));
  }
  result.prediction = ArgMax(result.log_likelihoods);
  result.prediction_norm = ArgMax(normalized);
  std::vector<double> sorted = result.log_likelihoods;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  result.margin = sorted[0] - sorted[1];
  return result;
}

}  // namespace

nlohmann::json ToJson(const ItemResult& item) {
  return {{"row", item.row},
          {"gold", item.gold},
          {"prediction", item.prediction},
          {"prediction_norm", item.prediction_norm},
          {"margin", item.margin},
          {"log_likelihoods", item.log_likelihoods},
          {"tokens", item.tokens}};
}

Accuracy MeanAccuracy(const std::vector<bool>& correct, const std::vector<std::string>& groups) {
  std::map<std::string, std::pair<double, double>> sums;  // count, correct
  for (size_t i = 0; i < correct.size(); ++i) {
    auto& [count, right] = sums[groups.empty() ? "" : groups[i]];
    count += 1;
    right += correct[i] ? 1 : 0;
  }
  // Sum of squared deviations within the groups over (n - k); one group gives the plain sample variance.
  const double n = static_cast<double>(correct.size());
  double right = 0, squares = 0;
  for (const auto& [group, sum] : sums) {
    right += sum.second;
    squares += sum.second * (1 - sum.second / sum.first);
  }
  const double freedom = n - static_cast<double>(sums.size());
  return {n > 0 ? right / n : 0, freedom > 0 ? std::sqrt(squares / freedom / n) : 0};
}

StatusOr<MultipleChoiceResult> EvaluateMultipleChoice(const std::vector<data::MultipleChoiceItem>& items,
                                                      const data::ScoreFn& score) {
  if (items.empty()) return InvalidArgument("no benchmark items to evaluate");
  std::vector<data::ScoreRequest> requests;
  for (const data::MultipleChoiceItem& item : items) {
    for (size_t choice = 0; choice < item.continuations.size(); ++choice) {
      requests.push_back({item.ContextOf(choice), item.continuations[choice]});
    }
  }
  RF_ASSIGN_OR_RETURN(const std::vector<data::Score> scores, score(requests));
  if (scores.size() != requests.size()) return Internal("got ", scores.size(), " scores for ", requests.size(), " requests");

  MultipleChoiceResult result{.task = items.front().task, .count = static_cast<int64_t>(items.size())};
  std::vector<bool> correct, correct_norm;
  std::vector<std::string> groups;
  size_t next = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    result.items.push_back(Judge(items[i], static_cast<int64_t>(i), &scores[next]));
    next += items[i].continuations.size();
    correct.push_back(result.items.back().prediction == items[i].gold);
    correct_norm.push_back(result.items.back().prediction_norm == items[i].gold);
    if (!items[i].subject.empty()) groups.push_back(items[i].subject);
  }
  result.acc = MeanAccuracy(correct, groups);
  if (data::HasAccNorm(result.task)) result.acc_norm = MeanAccuracy(correct_norm, groups);
  return result;
}

}  // namespace refinery::eval
