#include "worker/task/data/task_format.h"

#include "worker/task/data/benchmark.h"
#include "worker/task/data/text.h"

namespace refinery::data {
namespace {

TaskFormat Framed(std::string kind, std::vector<std::string> topics) {
  TaskFormat format;
  format.kind = std::move(kind);
  format.question_prefix = "Question: ";
  format.answer_prefix = "\nAnswer:";
  format.question_label = "Question:";
  format.answer_label = "Answer:";
  format.topics = std::move(topics);
  return format;
}

// Tasks whose context is a bare text that the answer continues: labels exist in the generation prompts only.
TaskFormat Bare(std::string kind, std::vector<std::string> topics) {
  TaskFormat format = Framed(std::move(kind), std::move(topics));
  format.question_prefix.clear();
  format.answer_prefix.clear();
  format.question_label = "Beginning:";
  format.answer_label = "Ending:";
  format.min_question_words = 3;
  return format;
}

TaskFormat Unnamed(const std::string& task) {
  if (task == "arc_easy") {
    return Framed("grade-school science questions",
                  {"plant roots", "the water cycle", "electric circuits", "the moon", "food chains", "rocks and minerals",
                   "sound waves", "the human heart", "weather", "magnets", "animal adaptations", "chemical reactions"});
  }
  if (task == "piqa") {
    return Framed("questions about how to do everyday things",
                  {"cooking eggs", "removing stains", "gardening", "repairing a bicycle", "packing for a trip", "painting a wall",
                   "caring for a pet", "sewing a button", "storing vegetables", "building a shelf"});
  }
  if (task == "social_i_qa") {
    TaskFormat format = Framed("questions about what people feel, want and do",
                               {"helping a neighbour", "losing a game", "a surprise party", "a job interview", "sharing food",
                                "a broken promise", "moving house", "a school trip", "an argument", "a present"});
    format.question_prefix = "Q: ";
    format.answer_prefix = "\nA:";
    format.question_label = "Q:";
    format.answer_label = "A:";
    return format;
  }
  if (task == "commonsense_qa" || task == "mmlu") {
    const bool mmlu = task == "mmlu";
    TaskFormat format =
        mmlu ? Framed("multiple choice exam questions with lettered options",
                      {"anatomy", "astronomy", "economics", "world history", "computer science", "law", "chemistry", "nutrition",
                       "philosophy", "statistics"})
             : Framed("common sense questions with lettered options",
                      {"kitchens", "animals", "travel", "money", "sleep", "schools", "the sea", "clothes", "music", "buildings"});
    format.letters = mmlu ? 4 : 5;
    if (mmlu) format.question_prefix.clear();
    return format;
  }
  if (task == "openbookqa") {
    return Bare("beginnings of sentences about science facts, with their endings",
                {"erosion", "photosynthesis", "predators", "seasons", "heat", "recycling", "stars", "fossils", "metals", "light"});
  }
  if (task == "hellaswag") {
    return Bare("beginnings of descriptions of everyday activities, with what happens next",
                {"washing a car", "playing the guitar", "baking bread", "surfing", "cutting hair", "planting trees",
                 "riding horses", "cleaning windows", "lifting weights", "drawing portraits"});
  }
  return Bare("beginnings of sentences about two people or things, with their endings",
              {"borrowing money", "cooking together", "a race", "two coats", "learning to drive", "a noisy street", "old shoes",
               "a long letter", "a heavy box", "a shy child"});
}

}  // namespace

StatusOr<TaskFormat> FormatOf(const std::string& task, const std::string& description) {
  RF_ASSIGN_OR_RETURN(const std::string name, CanonicalTask(task));
  TaskFormat format = Unnamed(name);
  format.task = name;
  format.description = description;
  return format;
}

std::string QuestionOf(const TaskFormat& format, std::string_view instruction) {
  std::string_view question = instruction;
  if (format.task == "mmlu" && question.starts_with("The following are multiple choice questions")) {
    const size_t end = question.find(".\n\n");
    if (end != std::string_view::npos) question.remove_prefix(end + 3);
  }
  if (question.starts_with(format.question_prefix)) question.remove_prefix(format.question_prefix.size());
  if (question.ends_with(format.answer_prefix)) question.remove_suffix(format.answer_prefix.size());
  return std::string(question);
}

std::string InstructionFor(const TaskFormat& format, std::string_view question, std::string_view topic) {
  const std::string opening =
      format.task == "mmlu" ? Join("The following are multiple choice questions (with answers) about ", topic, ".\n\n") : "";
  return Join(opening, format.question_prefix, question, format.answer_prefix);
}

std::string ShotText(const TaskFormat& format, const Example& seed) {
  return Join(format.question_prefix, QuestionOf(format, seed.instruction), format.answer_prefix, " ", seed.output);
}

}  // namespace refinery::data
