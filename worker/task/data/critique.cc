#include "worker/task/data/critique.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "common/digest.h"
#include "worker/task/data/prompts.h"
#include "worker/task/data/random.h"

namespace refinery::data {
namespace {

bool IsRejected(const Example& example) { return example.extra.is_object() && example.extra.contains("rejected"); }

std::string JudgeBlock(const TaskFormat& format, std::string_view question, std::string_view answer) {
  return Join(format.question_label, " ", question, "\nProposed answer: ", answer, "\nIs the proposed answer correct?");
}

// Seeds with their own answer (Yes) and with the answer of another one (No), in turns.
std::string JudgeShots(const TaskFormat& format, const std::vector<Example>& seeds, const CritiqueSettings& settings) {
  SeededRandom random(DeriveSeed(settings.seed, "judge_shots"));
  const std::vector<size_t> order = random.Sample(seeds.size(), std::max<size_t>(2, settings.few_shot));
  std::string shots;
  for (size_t i = 0; i < order.size(); ++i) {
    const Example& seed = seeds[order[i]];
    const Example& other = seeds[order[(i + 1) % order.size()]];
    const bool right = i % 2 == 0 || other.output == seed.output;
    shots += Join(JudgeBlock(format, QuestionOf(format, seed.instruction), right ? seed.output : other.output),
                  right ? " Yes\n\n" : " No\n\n");
  }
  return shots;
}

// Rank of each value in [0, 1], the mean rank for equal values.
std::vector<double> Ranks(const std::vector<double>& values) {
  std::vector<size_t> order(values.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return values[a] < values[b]; });
  std::vector<double> ranks(values.size(), 1.0);
  if (values.size() < 2) return ranks;
  for (size_t i = 0, j = 0; i < order.size(); i = j) {
    while (j < order.size() && values[order[j]] == values[order[i]]) ++j;
    const double mean = static_cast<double>(i + j - 1) / 2;
    for (size_t k = i; k < j; ++k) ranks[order[k]] = mean / static_cast<double>(values.size() - 1);
  }
  return ranks;
}

// Four requests per example: answer, answer without question, " Yes", " No".
std::vector<ScoreRequest> JudgeRequests(const TaskFormat& format, const std::vector<Example>& seeds,
                                        const CritiqueSettings& settings, const std::vector<Example>& examples,
                                        const std::vector<size_t>& judged) {
  const std::string shots = AnswerShots(format, seeds, {.seed = settings.seed, .few_shot = settings.few_shot});
  const std::string judge_shots = JudgeShots(format, seeds, settings);
  std::vector<ScoreRequest> requests;
  for (size_t i = 0; i < judged.size(); ++i) {
    const Example& example = examples[judged[i]];
    const std::string question = QuestionOf(format, example.instruction);
    const std::string answer = Join(" ", example.output);
    std::string null_question;
    if (format.answer_prefix.empty()) {
      const Example& other = judged.size() > 1 ? examples[judged[(i + 1) % judged.size()]] : seeds.front();
      null_question = QuestionOf(format, other.instruction);
    }
    const std::string yes_no = Join(judge_shots, JudgeBlock(format, question, example.output));
    requests.push_back({AnswerPrompt(format, shots, question), answer});
    requests.push_back({AnswerPrompt(format, shots, null_question), answer});
    requests.push_back({yes_no, " Yes"});
    requests.push_back({yes_no, " No"});
  }
  return requests;
}

}  // namespace

Status Critique(const TaskFormat& format, const std::vector<Example>& seeds, const CritiqueSettings& settings,
                const ScoreFn& score, std::vector<Example>* examples) {
  if (!(settings.keep_fraction > 0 && settings.keep_fraction <= 1)) {
    return InvalidArgument("critique.keep_fraction must be in (0, 1], is ", settings.keep_fraction);
  }
  if (seeds.empty()) return InvalidArgument("critique needs at least one seed example");
  std::vector<size_t> judged;
  for (size_t i = 0; i < examples->size(); ++i) {
    if (!IsRejected((*examples)[i])) judged.push_back(i);
  }
  if (judged.empty()) return absl::OkStatus();
  const std::vector<ScoreRequest> requests = JudgeRequests(format, seeds, settings, *examples, judged);
  RF_ASSIGN_OR_RETURN(const std::vector<Score> scores, score(requests));
  if (scores.size() != requests.size()) return Internal("the judge returned ", scores.size(), " scores for ", requests.size());

  std::vector<double> pmi, yes;
  for (size_t i = 0; i < judged.size(); ++i) {
    const Score* four = &scores[4 * i];
    const double tokens = static_cast<double>(std::max<int64_t>(1, four[0].tokens));
    const double null_tokens = static_cast<double>(std::max<int64_t>(1, four[1].tokens));
    pmi.push_back(four[0].log_likelihood / tokens - four[1].log_likelihood / null_tokens);
    yes.push_back(1 / (1 + std::exp(four[3].log_likelihood - four[2].log_likelihood)));
  }
  const std::vector<double> pmi_rank = Ranks(pmi), yes_rank = Ranks(yes);
  std::vector<double> total(judged.size());
  for (size_t i = 0; i < judged.size(); ++i) total[i] = (pmi_rank[i] + yes_rank[i]) / 2;

  std::vector<size_t> order(judged.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return total[a] > total[b]; });
  const double wanted = std::round(settings.keep_fraction * static_cast<double>(judged.size()));
  const size_t keep = std::max<size_t>(1, static_cast<size_t>(wanted));
  for (size_t place = 0; place < order.size(); ++place) {
    const size_t i = order[place];
    const Score* four = &scores[4 * i];
    nlohmann::json& extra = (*examples)[judged[i]].extra;
    if (!extra.is_object()) extra = nlohmann::json::object();
    extra["judge"] = {{"answer_log_likelihood", four[0].log_likelihood}, {"null_log_likelihood", four[1].log_likelihood},
                      {"answer_tokens", four[0].tokens}, {"pmi", pmi[i]}, {"yes", yes[i]}, {"score", total[i]},
                      {"keep", place < keep}};
  }
  return absl::OkStatus();
}

}  // namespace refinery::data
