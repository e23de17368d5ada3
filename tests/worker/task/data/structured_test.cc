// Structured self-instruct: questions as JSON objects, in prompts and out of what a teacher wrote.
#include "worker/task/data/structured.h"

#include <nlohmann/json.hpp>

#include "tests/support/status_matchers.h"
#include "worker/task/data/text.h"

namespace refinery::data {
namespace {

using nlohmann::json;

TaskFormat Format(const std::string& task) {
  const auto format = FormatOf(task);
  RF_CHECK(format.ok());
  return *format;
}

std::vector<Example> Seeds(const TaskFormat& format, const std::vector<std::string>& questions) {
  std::vector<Example> seeds;
  for (const std::string& question : questions) {
    Example seed;
    seed.instruction = InstructionFor(format, question, "astronomy");
    seed.output = format.letters > 0 ? "B" : "iron";
    seeds.push_back(seed);
  }
  return seeds;
}

// Goal: the objects that prompts show are those that the parser reads: each seed's line gives its question again.
TEST(StructuredTest, SeedsGoInAndOutOfObjects) {
  const std::string lettered = "Which planet is the \"red\" one?\nA. Venus\nB. Mars\nC. Earth\nD. Pluto";
  for (const auto& [task, question] : std::vector<std::pair<std::string, std::string>>{
           {"arc_easy", "What do magnets attract, and why?"}, {"mmlu", lettered}}) {
    const TaskFormat format = Format(task);
    const std::vector<Example> seeds = Seeds(format, {question, question, question});
    const std::vector<std::string> words = SeedTopics(format, seeds);
    const QuestionPlan plan = PlanQuestion(format, seeds, words, {"bees", "ice"}, 1, {.seed = 4, .few_shot = 2});
    const std::string prompt = StructuredPrompt(format, seeds, words, plan);
    EXPECT_TRUE(prompt.ends_with("\n\nTopic: ice\n")) << prompt;
    int objects = 0;
    for (const std::string& line : Split(prompt, "\n")) {
      if (!line.starts_with("{")) continue;
      ++objects;
      const Parsed parsed = ParseStructuredQuestion(format, line, "end");
      EXPECT_TRUE(parsed.ok()) << parsed.reason << ": " << parsed.detail;
      EXPECT_EQ(parsed.text, question);
      // What the prompt shows is what the schema asks for.
      const json object = json::parse(line), schema = json::parse(QuestionSchema(format));
      EXPECT_EQ(object.size(), schema["properties"].size());
      for (const json& name : schema["required"]) EXPECT_TRUE(object.contains(name.get<std::string>()));
    }
    EXPECT_EQ(objects, 2);
  }
}

TEST(StructuredTest, WhatIsNoQuestionSaysWhy) {
  const TaskFormat plain = Format("arc_easy"), lettered = Format("mmlu");
  const auto reason = [](const TaskFormat& format, const char* text, const char* finish = "end") {
    return ParseStructuredQuestion(format, text, finish).reason;
  };
  EXPECT_EQ(reason(plain, R"({"question": "What is the)", "length"), "truncated");
  EXPECT_EQ(reason(plain, R"({"question": "What is the)"), "bad_json");
  EXPECT_EQ(reason(plain, R"({"question": 7})"), "bad_json");
  EXPECT_EQ(reason(plain, R"(["What is ice made of?"])"), "bad_json");
  EXPECT_EQ(reason(plain, R"({"question": "  "})"), "no_question");
  EXPECT_EQ(reason(plain, R"({"question": "Why?"})"), "too_short");
  EXPECT_EQ(reason(plain, R"({"question": "What does the picture above show us?"})"), "blacklist");
  EXPECT_EQ(reason(lettered, R"({"question": "Which planet is red, really?"})"), "bad_json");
  EXPECT_EQ(reason(lettered, R"({"question": "Which planet is red, really?", "options": ["Mars", "Venus"]})"), "bad_json");
  EXPECT_EQ(reason(lettered, R"({"question": "Which planet is red, really?", "options": ["Mars", "Venus", "Mars", "Io"]})"), "bad_options");
  EXPECT_EQ(reason(lettered, R"({"question": "Which planet is red, really?", "options": ["Mars", "Venus", "Earth", "Io"]})"), "");
}

TEST(StructuredTest, LetteredAnswersAreOneOfTheLetters) {
  EXPECT_EQ(AnswerRegex(Format("mmlu")), " [A-D]");
  EXPECT_EQ(AnswerRegex(Format("commonsense_qa")), " [A-E]");
  EXPECT_EQ(AnswerRegex(Format("arc_easy")), "");
}

}  // namespace
}  // namespace refinery::data
