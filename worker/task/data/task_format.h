// worker/task/data/task_format.h
//
// How the questions of one benchmark are written in prompts: the exact frame of the training instruction (the context that
// the benchmark scores) and the labels, starter topics and limits that self-instruct uses to ask a model for more of them.
//
// Threads: pure functions.

#pragma once

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "common/status.h"
#include "worker/task/data/example.h"

namespace refinery::data {

struct TaskFormat {
  std::string task;
  std::string kind;              // "grade-school science questions": completes "The following are ..."
  std::string description;       // optional sentence of the user's, put before everything else
  std::string question_prefix;   // of the instruction: "Question: "; empty for bare sentences
  std::string answer_prefix;     // "\nAnswer:"; empty for bare sentences
  std::string question_label;    // in generation prompts: "Question:"
  std::string answer_label;      // "Answer:"
  size_t letters = 0;            // > 0: the question carries that many lettered options and the answer is a letter
  size_t min_question_words = 4;
  size_t max_question_words = 150;
  size_t max_answer_words = 40;
  std::vector<std::string> topics;  // to begin with
};

// INVALID_ARGUMENT for an unknown task. `description` may be empty.
StatusOr<TaskFormat> FormatOf(const std::string& task, const std::string& description = "");

// The bare question of an instruction in this format (an instruction in another format comes back whole).
std::string QuestionOf(const TaskFormat& format, std::string_view instruction);
// The instruction for a bare question; mmlu's opening sentence names the topic as its subject.
std::string InstructionFor(const TaskFormat& format, std::string_view question, std::string_view topic);
// "Question: ...\nAnswer: ...": instruction and answer joined as in training, without mmlu's opening sentence.
std::string ShotText(const TaskFormat& format, const Example& seed);

}  // namespace refinery::data
