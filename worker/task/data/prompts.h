// worker/task/data/prompts.h
//
// Self-instruct in the completion form: every prompt is the beginning of a list that a base or instruct model continues
// (numbered topics; "Topic / Question" blocks; the task's own few-shot prompt for the answer). Small models do not write
// reliable JSON, but they continue lists; the answer prompt is the very text that the benchmark scores.
//
// Source: Self-Instruct (Wang et al. 2022, arXiv:2212.10560) for the stages and the checks on generated text.
// Nothing is lost on the way: text that fails a check comes back with the reason, and stays in the raw examples.
//
//   topics  = format.topics + ParseTopics(completions of TopicsPrompt)
//   for each request index i:  plan = PlanQuestion(...);  question = ParseQuestion(completion of plan.prompt)
//                              answer = ParseAnswer(completion of AnswerPrompt(question))  ->  RawExample(...)
//
// A request is planned from (seed, index) alone, so every shard can be made again, and made anywhere.
// Threads: pure functions.

#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "worker/task/data/example.h"
#include "worker/task/data/task_format.h"

namespace refinery::data {

// A generated text after cleaning. `reason` is empty when it may be used, else one stable word (see Reasons in prompts.cc);
// `detail` says more for a person.
struct Parsed {
  std::string text;
  std::string reason;
  std::string detail;
  bool ok() const { return reason.empty(); }
};

// A numbered list of topics that the model is to continue. `index` varies the order of the starter topics.
std::string TopicsPrompt(const TaskFormat& format, uint64_t seed, size_t index);
// The new topics of a continued list: not too long, not known, not twice. `dropped` may be null.
std::vector<std::string> ParseTopics(std::string_view generated, const std::vector<std::string>& known,
                                     std::vector<Parsed>* dropped);

struct QuestionPlan {
  size_t index = 0;               // of the request, over all shards
  std::string topic;
  std::vector<size_t> shots;      // indices of the seeds shown
  std::string prompt;
  uint64_t question_seed = 0;     // for sampling the question
  uint64_t answer_seed = 0;       // for sampling the answer
};

// A word for what each seed is about: its rarest long word among all seeds. Computed once for PlanQuestion.
std::vector<std::string> SeedTopics(const TaskFormat& format, const std::vector<Example>& seeds);

struct PlanSettings {
  uint64_t seed = 0;
  size_t few_shot = 4;
};
// `seeds` and `topics` must not be empty; `seed_topics` is SeedTopics(format, seeds).
QuestionPlan PlanQuestion(const TaskFormat& format, const std::vector<Example>& seeds,
                          const std::vector<std::string>& seed_topics, const std::vector<std::string>& topics, size_t index,
                          const PlanSettings& settings);

// The task's few-shot prompt for a question. The same seeds stand before every question (chosen by the seed), so that the
// engine computes them once.
std::string AnswerShots(const TaskFormat& format, const std::vector<Example>& seeds, const PlanSettings& settings);
std::string AnswerPrompt(const TaskFormat& format, const std::string& shots, std::string_view question);

// Text before which generation can stop, as a hint for the engine: parsing cuts there in any case.
std::string QuestionStop(const TaskFormat& format);   // "\n", or "\nAnswer:" where questions have several lines
inline std::string AnswerStop() { return "\n"; }

// `finish_reason` as the engine gives it: "length" without the stop text means truncated.
Parsed ParseQuestion(const TaskFormat& format, std::string_view generated, std::string_view finish_reason);
Parsed ParseAnswer(const TaskFormat& format, std::string_view question, std::string_view generated,
                   std::string_view finish_reason);

// The raw example of a request, also of a failed one: then extra["rejected"] = {"reason", "detail", "stage"} and the fields hold what
// there is. extra also holds "request", "topic" and "question".
Example RawExample(const TaskFormat& format, const QuestionPlan& plan, const Parsed& question, const Parsed& answer);

}  // namespace refinery::data
