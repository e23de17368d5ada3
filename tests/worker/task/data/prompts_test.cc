// Self-instruct: prompts are functions of seed and index, generated text is cleaned and refused for stated reasons.
#include "worker/task/data/prompts.h"

#include "tests/support/status_matchers.h"
#include "worker/task/data/critique.h"

namespace refinery::data {
namespace {

using ::refinery::testing::IsOk;
using ::refinery::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

TaskFormat Format(const std::string& task) {
  const auto format = FormatOf(task);
  RF_CHECK(format.ok());
  return *format;
}

std::vector<Example> Seeds(const TaskFormat& format) {
  std::vector<Example> seeds;
  for (const auto& [question, answer] : std::vector<std::pair<std::string, std::string>>{
           {"What do plants need to grow?", "sunlight"}, {"Which planet is closest to the Sun?", "Mercury"},
           {"What do magnets attract?", "iron"},         {"What do bees collect?", "nectar"},
           {"What melts ice?", "heat"}}) {
    Example seed;
    seed.instruction = InstructionFor(format, question, "");
    seed.output = answer;
    seeds.push_back(seed);
  }
  return seeds;
}

TEST(TaskFormatTest, QuestionsGoInAndOutOfEveryFormat) {
  for (const char* task : {"arc_easy", "commonsense_qa", "hellaswag", "mmlu", "openbookqa", "piqa", "social_i_qa", "winogrande"}) {
    const TaskFormat format = Format(task);
    EXPECT_EQ(QuestionOf(format, InstructionFor(format, "Why is it so?", "high school physics")), "Why is it so?") << task;
    EXPECT_GE(format.topics.size(), 8U) << task;
  }
  EXPECT_EQ(InstructionFor(Format("siqa"), "Why?", ""), "Q: Why?\nA:");
  EXPECT_THAT(FormatOf("boolq"), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("arc_easy")));
}

TEST(PromptsTest, PlansDependOnSeedAndIndexAlone) {
  const TaskFormat format = Format("arc_easy");
  const std::vector<Example> seeds = Seeds(format);
  const std::vector<std::string> words = SeedTopics(format, seeds);
  EXPECT_THAT(words, ElementsAre("plants", "closest", "magnets", "collect", "melts"));
  const auto plan = [&](size_t index, uint64_t seed) {
    return PlanQuestion(format, seeds, words, {"bees", "ice"}, index, {.seed = seed, .few_shot = 2});
  };
  EXPECT_EQ(plan(7, 1).prompt, plan(7, 1).prompt);
  EXPECT_EQ(plan(7, 1).question_seed, plan(7, 1).question_seed);
  EXPECT_NE(plan(7, 1).question_seed, plan(8, 1).question_seed);
  EXPECT_NE(plan(7, 1).question_seed, plan(7, 2).question_seed);
  EXPECT_EQ(plan(7, 1).topic, "ice");
  EXPECT_EQ(plan(7, 1).shots.size(), 2U);
  EXPECT_TRUE(plan(7, 1).prompt.ends_with("\n\nTopic: ice\nQuestion:")) << plan(7, 1).prompt;
}

TEST(PromptsTest, AnswersAreAskedInTheBenchmarksOwnWords) {
  const TaskFormat format = Format("arc_easy");
  const std::string shots = AnswerShots(format, Seeds(format), {.seed = 3, .few_shot = 2});
  EXPECT_EQ(AnswerPrompt(format, "", "Why?"), "Question: Why?\nAnswer:");
  EXPECT_EQ(shots, AnswerShots(format, Seeds(format), {.seed = 3, .few_shot = 2}));
  EXPECT_TRUE(shots.starts_with("Question: ") && shots.ends_with("\n\n")) << shots;
}

TEST(PromptsTest, TopicsAreReadOffTheContinuedList) {
  std::vector<Parsed> dropped;
  EXPECT_THAT(ParseTopics(" the moon.\n10. Plant Roots\n11. tides\n12. a very long topic that has many words\n13. vol", {"plant roots"},
                          &dropped),
              ElementsAre("the moon", "tides"));
  ASSERT_EQ(dropped.size(), 3U);
  EXPECT_EQ(dropped[0].reason, "known_topic");
  EXPECT_EQ(dropped[1].reason, "too_long");
  EXPECT_EQ(dropped[2].reason, "truncated");
}

TEST(PromptsTest, QuestionsAreCleanedOrRefusedWithAReason) {
  const TaskFormat format = Format("arc_easy");
  const auto reason = [&](const char* text, const char* finish = "stop") { return ParseQuestion(format, text, finish).reason; };
  EXPECT_EQ(ParseQuestion(format, " \"Why  is the sky blue?\" \nAnswer: no", "length").text, "Why is the sky blue?");
  EXPECT_EQ(reason(" Why is the sky blue?\nAnswer:"), "");
  EXPECT_EQ(reason("  \n"), "no_question");
  EXPECT_EQ(reason(" Why is the sky", "length"), "truncated");
  EXPECT_EQ(reason(" Why so?"), "too_short");
  EXPECT_EQ(reason(" Which of these is right:"), "ends_with_colon");
  EXPECT_EQ(reason(" What does the picture above show?"), "blacklist");
  EXPECT_EQ(reason(" I'm sorry, but that will not do."), "refusal");
  EXPECT_EQ(reason(" (a) Why is it so?"), "bad_start");
  EXPECT_EQ(reason(" Why is it so? Answer: because"), "label_leak");
  EXPECT_EQ(reason(" the big dog and the big dog and the big dog and"), "repetitive");
}

TEST(PromptsTest, AnswersAreCleanedOrRefusedWithAReason) {
  const TaskFormat format = Format("arc_easy");
  const auto parse = [&](const char* text, const char* finish = "stop") {
    return ParseAnswer(format, "Why is the sky blue today?", text, finish);
  };
  EXPECT_EQ(parse(" air scatters light\n\nQuestion:").text, "air scatters light");
  EXPECT_EQ(parse("\n").reason, "no_answer");
  EXPECT_EQ(parse(" because the", "length").reason, "truncated");
  EXPECT_EQ(parse(" the sky is blue today").reason, "");
  EXPECT_EQ(parse(" why is the sky blue today").reason, "repeats_question");
  EXPECT_EQ(parse(" as an AI model I think").reason, "refusal");
}

TEST(PromptsTest, LetteredQuestionsNeedEveryOptionOnce) {
  const TaskFormat format = Format("mmlu");
  EXPECT_EQ(QuestionStop(format), "\nAnswer:");
  EXPECT_EQ(ParseQuestion(format, " What is one and one?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B", "stop").text,
            "What is one and one?\nA. 1\nB. 2\nC. 3\nD. 4");
  EXPECT_EQ(ParseQuestion(format, " What is one and one?\nA. 1\nB. 1\nC. 3\nD. 4\nAnswer: B", "stop").reason, "bad_options");
  EXPECT_EQ(ParseQuestion(format, " What is one and one?\nA. 1\nAnswer: B", "stop").reason, "bad_options");
  EXPECT_EQ(ParseAnswer(format, "q", " B\n", "stop").text, "B");
  EXPECT_EQ(ParseAnswer(format, "q", " E\n", "stop").reason, "not_a_letter");
}

TEST(PromptsTest, RefusedTextStaysInTheRawExample) {
  const TaskFormat format = Format("arc_easy");
  const QuestionPlan plan{.index = 4, .topic = "ice"};
  const Example good = RawExample(format, plan, {"Why is it so?", "", ""}, {"heat", "", ""});
  EXPECT_EQ(good.instruction, "Question: Why is it so?\nAnswer:");
  EXPECT_FALSE(good.extra.contains("rejected"));
  const Example bad = RawExample(format, plan, {"Why is it so?", "", ""}, {"", "no_answer", "d"});
  EXPECT_EQ(bad.extra["rejected"]["reason"], "no_answer");
  EXPECT_EQ(bad.extra["rejected"]["stage"], "answer");
  EXPECT_EQ(bad.extra["request"], 4);
}

// Goal: the better half by both signals is kept, with the numbers in the example.
// Method: a judge that knows the answers: right ones are likely behind their question and get Yes.
TEST(CritiqueTest, KeepsWhatTheJudgeFindsLikelier) {
  const TaskFormat format = Format("arc_easy");
  std::vector<Example> examples;
  for (const char* answer : {"right", "wrong", "right", "wrong"}) {
    Example example;
    example.instruction = InstructionFor(format, Join("Is ", examples.size(), " it?"), "");
    example.output = answer;
    examples.push_back(example);
  }
  examples.push_back(examples[0]);
  examples.back().extra = {{"rejected", {{"reason", "too_short"}}}};
  const ScoreFn judge = [](const std::vector<ScoreRequest>& requests) -> StatusOr<std::vector<Score>> {
    std::vector<Score> scores;
    for (const ScoreRequest& request : requests) {
      const bool asked = request.context.find("Question: \nAnswer:") == std::string::npos;
      const bool right = Join(request.context, request.continuation).find(" right") != std::string::npos;
      double value = -3;
      if (request.continuation == " Yes") value = right ? -1 : -2;
      if (request.continuation == " No") value = -1.5;
      if (request.continuation == " right" && asked) value = -1;
      scores.push_back({value, 1, false});
    }
    return scores;
  };
  ASSERT_THAT(Critique(format, Seeds(format), {.few_shot = 2, .keep_fraction = 0.5}, judge, &examples), IsOk());
  for (size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(examples[i].extra["judge"]["keep"], i % 2 == 0) << i;
    EXPECT_EQ(examples[i].extra["judge"]["pmi"], i % 2 == 0 ? 2 : 0);
    EXPECT_NEAR(examples[i].extra["judge"]["yes"].get<double>(), i % 2 == 0 ? 1 / (1 + std::exp(-0.5)) : 1 / (1 + std::exp(0.5)), 1e-9);
  }
  EXPECT_FALSE(examples[4].extra.contains("judge"));
  EXPECT_THAT(Critique(format, Seeds(format), {.keep_fraction = 0}, judge, &examples),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("keep_fraction")));
}

}  // namespace
}  // namespace refinery::data
