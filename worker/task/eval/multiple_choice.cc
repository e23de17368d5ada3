#include "worker/task/eval/multiple_choice.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <utility>

#include "common/digest.h"
#include "worker/task/data/text.h"

namespace refinery::eval {
namespace {

int64_t ArgMax(const std::vector<double>& values) {
  return std::max_element(values.begin(), values.end()) - values.begin();
}

// Predictions and margin, from what was scored.
void Judge(ItemResult* item) {
  std::vector<double> normalized;
  for (size_t choice = 0; choice < item->log_likelihoods.size(); ++choice) {
    normalized.push_back(item->log_likelihoods[choice] / static_cast<double>(item->characters[choice]));
  }
  item->prediction = ArgMax(item->log_likelihoods);
  item->prediction_norm = ArgMax(normalized);
  std::vector<double> sorted = item->log_likelihoods;
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  item->margin = sorted[0] - sorted[1];
}

// One block, appended to `results`.
Status ScoreBlock(const std::vector<data::MultipleChoiceItem>& items, size_t begin, size_t end, const data::ScoreFn& score,
                  const PromptOptions& prompt, std::vector<ItemResult>* results) {
  std::vector<data::ScoreRequest> requests;
  const size_t first = results->size();
  for (size_t i = begin; i < end; ++i) {
    RF_ASSIGN_OR_RETURN(std::vector<data::ScoreRequest> own, RequestsOf(items[i], prompt));
    results->push_back({.row = static_cast<int64_t>(i), .subject = items[i].subject, .context_digest = ContextDigest(own),
                        .gold = items[i].gold});
    for (data::ScoreRequest& request : own) requests.push_back(std::move(request));
  }
  RF_ASSIGN_OR_RETURN(const std::vector<data::Score> scores, score(requests));
  if (scores.size() != requests.size()) return Internal("got ", scores.size(), " scores for ", requests.size(), " requests");
  size_t next = 0;
  for (size_t i = begin; i < end; ++i) {
    ItemResult& result = (*results)[first + i - begin];
    for (const std::string& choice : items[i].choices) {
      result.log_likelihoods.push_back(scores[next].log_likelihood);
      result.tokens.push_back(scores[next++].tokens);
      result.characters.push_back(static_cast<int64_t>(data::CodePoints(choice)));
    }
    Judge(&result);
  }
  return absl::OkStatus();
}

}  // namespace

nlohmann::json ToJson(const ItemResult& item) {
  nlohmann::json json = {{"row", item.row},
                         {"context", item.context_digest},
                         {"gold", item.gold},
                         {"prediction", item.prediction},
                         {"prediction_norm", item.prediction_norm},
                         {"margin", item.margin},
                         {"log_likelihoods", item.log_likelihoods},
                         {"tokens", item.tokens},
                         {"characters", item.characters}};
  if (!item.subject.empty()) json["subject"] = item.subject;
  return json;
}

StatusOr<ItemResult> ItemResultFromJson(const nlohmann::json& json, const std::string& where) {
  ItemResult item;
  try {
    item.row = json.at("row");
    item.subject = json.value("subject", "");
    item.context_digest = json.at("context");
    item.gold = json.at("gold");
    item.log_likelihoods = json.at("log_likelihoods").get<std::vector<double>>();
    item.tokens = json.at("tokens").get<std::vector<int64_t>>();
    item.characters = json.at("characters").get<std::vector<int64_t>>();
  } catch (const nlohmann::json::exception& error) {
    return InvalidArgument(where, " is not a scored item: ", error.what());
  }
  if (item.log_likelihoods.size() < 2 || item.characters.size() != item.log_likelihoods.size() ||
      item.tokens.size() != item.log_likelihoods.size()) {
    return InvalidArgument(where, " is not a scored item: two or more choices are needed, each with its length and tokens");
  }
  Judge(&item);
  return item;
}

std::string ContextDigest(const std::vector<data::ScoreRequest>& requests) {
  std::string text;
  for (const data::ScoreRequest& request : requests) text += Join(request.context, "\x1f", request.continuation, "\x1e");
  return DigestOf(text);
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

StatusOr<MultipleChoiceResult> Summarize(const std::string& task, std::vector<ItemResult> items, bool acc_norm) {
  std::sort(items.begin(), items.end(), [](const ItemResult& a, const ItemResult& b) { return a.row < b.row; });
  std::vector<bool> correct, correct_norm;
  std::vector<std::string> groups;
  for (size_t i = 0; i < items.size(); ++i) {
    if (i > 0 && items[i].row == items[i - 1].row) return InvalidArgument(task, ": row ", items[i].row, " was scored twice");
    correct.push_back(items[i].correct());
    correct_norm.push_back(items[i].correct_norm());
    if (!items[i].subject.empty()) groups.push_back(items[i].subject);
  }
  MultipleChoiceResult result{.task = task, .count = static_cast<int64_t>(items.size())};
  result.acc = MeanAccuracy(correct, groups);
  if (acc_norm) result.acc_norm = MeanAccuracy(correct_norm, groups);
  result.items = std::move(items);
  return result;
}

StatusOr<MultipleChoiceResult> EvaluateMultipleChoice(const std::vector<data::MultipleChoiceItem>& items,
                                                      const data::ScoreFn& score, const MultipleChoiceOptions& options) {
  if (items.empty()) return InvalidArgument("no benchmark items to evaluate");
  const size_t block = static_cast<size_t>(kBlockItems), shards = static_cast<size_t>(options.shards);
  std::vector<ItemResult> results;
  for (size_t i = static_cast<size_t>(options.shard) * block; i < items.size(); i += shards * block) {
    RF_RETURN_IF_ERROR(ScoreBlock(items, i, std::min(i + block, items.size()), score, options.prompt, &results));
  }
  const std::string& task = items.front().task;
  return Summarize(task, std::move(results), options.acc_norm.value_or(data::HasAccNorm(task)));
}

}  // namespace refinery::eval
