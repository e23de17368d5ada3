#include "worker/task/eval/exact_match.h"

#include <cmath>
#include <cstring>

#include "common/digest.h"
#include "worker/task/data/text.h"

namespace refinery::eval {
namespace {

constexpr char kPunctuation[] = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~";
constexpr int64_t kBootstrapResamples = 100'000;   // the harness' default

std::string Reduced(std::string_view text, const ExactMatchRules& rules) {
  std::string kept;
  for (const char c : text) {
    if (rules.ignore_punctuation && c != '\0' && std::strchr(kPunctuation, c) != nullptr) continue;
    if (rules.ignore_numbers && c >= '0' && c <= '9') continue;
    kept += c;
  }
  return rules.ignore_case ? data::Lower(kept) : kept;
}

Figure FigureOf(const TaskItems& task, const char* metric, const std::vector<double>& values) {
  const MeanAndError mean = MeanOf(values);
  return {.task = task.name, .metric = metric, .value = mean.mean,
          .standard_error = values.size() < 2 ? std::nullopt : std::optional<double>(mean.standard_error),
          .count = static_cast<int64_t>(values.size())};
}

}  // namespace

bool ExactlyMatches(std::string_view answer, std::string_view expected, const ExactMatchRules& rules) {
  return Reduced(rules.strip ? data::Strip(answer) : answer, rules) == Reduced(expected, rules);
}

StatusOr<ExactMatchResult> EvaluateExactMatch(const TaskItems& task, const GenerateFn& generate, const PromptOptions& prompt) {
  if (task.items.empty()) return InvalidArgument(task.name, " has no items");
  std::vector<std::string> prompts;
  for (const data::MultipleChoiceItem& item : task.items) {
    RF_ASSIGN_OR_RETURN(std::string context, ContextOf(item, item.bodies.front(), prompt));
    prompts.push_back(std::move(context));
  }
  RF_ASSIGN_OR_RETURN(const std::vector<std::string> answers, generate(prompts, task.exact_match));
  if (answers.size() != prompts.size()) return Internal("got ", answers.size(), " answers to ", prompts.size(), " prompts");
  ExactMatchResult result;
  std::vector<double> values;
  for (size_t i = 0; i < prompts.size(); ++i) {
    const std::string& expected = task.items[i].choices.front();
    const bool correct = ExactlyMatches(answers[i], expected, task.exact_match);
    result.items.push_back({DigestOf(prompts[i]), answers[i], expected, correct});
    values.push_back(correct ? 1 : 0);
  }
  result.figures = {FigureOf(task, "exact_match", values)};
  return result;
}

StatusOr<AnswerLikelihoods> EvaluateAnswerLikelihoods(const TaskItems& task, const data::ScoreFn& score,
                                                      const PromptOptions& prompt) {
  if (task.items.empty()) return InvalidArgument(task.name, " has no items");
  std::vector<data::ScoreRequest> requests;
  for (const data::MultipleChoiceItem& item : task.items) {
    RF_ASSIGN_OR_RETURN(const std::vector<data::ScoreRequest> own, RequestsOf(item, prompt));
    requests.push_back(own.front());
  }
  AnswerLikelihoods result;
  RF_ASSIGN_OR_RETURN(result.items, score(requests));
  std::vector<double> likelihoods, greedy;
  for (const data::Score& item : result.items) {
    likelihoods.push_back(item.log_likelihood);
    greedy.push_back(item.is_greedy ? 1 : 0);
  }
  const auto perplexity = [](const std::vector<double>& values) {
    double sum = 0;
    for (const double value : values) sum += value;
    return std::exp(-sum / static_cast<double>(values.size()));
  };
  Figure figure = FigureOf(task, "perplexity", likelihoods);
  figure.value = perplexity(likelihoods);
  if (figure.standard_error) figure.standard_error = HarnessBootstrapError(likelihoods, kBootstrapResamples, perplexity);
  result.figures = {std::move(figure), FigureOf(task, "acc", greedy)};
  return result;
}

}  // namespace refinery::eval
