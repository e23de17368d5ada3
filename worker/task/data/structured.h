// worker/task/data/structured.h
//
// Self-instruct with questions as JSON objects: the prompt shows seeds as objects under their topics, and the schema keeps the
// teacher to one more of them, so that even a small model's question always has its parts (all lettered options, one of each).
// The checks of prompts.h on the text follow; answers are asked for as without structure.
//
// Threads: pure functions.

#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "worker/task/data/example.h"
#include "worker/task/data/prompts.h"
#include "worker/task/data/task_format.h"

namespace refinery::data {

// The plan's prompt in this form: seeds and topic are those of the plan.
std::string StructuredPrompt(const TaskFormat& format, const std::vector<Example>& seeds, const std::vector<std::string>& seed_topics,
                             const QuestionPlan& plan);
// JSON schema of {"question": text} or, for lettered questions, {"question": text, "options": [text, ...]}.
std::string QuestionSchema(const TaskFormat& format);
// The question as text (options as lettered lines) after the checks of ParseQuestion; reason bad_json for what is no such object
// (cut short by the token limit: truncated).
Parsed ParseStructuredQuestion(const TaskFormat& format, std::string_view generated, std::string_view finish_reason);
// What an answer must look like: a regular expression for lettered questions, else empty (no constraint).
std::string AnswerRegex(const TaskFormat& format);

}  // namespace refinery::data
