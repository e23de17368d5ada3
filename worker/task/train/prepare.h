// worker/task/train/prepare.h
//
// What has to hold before training starts, and the teacher's rows looked up once.

#pragma once

#include <nlohmann/json.hpp>
#include <vector>

#include "worker/task/train/trainer.h"

namespace refinery::train {

// Rows of every example; empty without a teacher.
struct TeacherTables {
  std::vector<distill::TeacherRows> train;
  std::vector<distill::TeacherRows> validation;
};

// INVALID_ARGUMENT naming the setting.
Status CheckSettings(const TrainSettings& settings);
// INVALID_ARGUMENT naming the example, for ids outside the vocabulary, empty answers and sequences that are too long;
// FAILED_PRECONDITION when teacher and student do not share a vocabulary.
Status CheckInputs(const TrainInputs& inputs, const TrainSettings& settings);
// NOT_FOUND, or DATA_LOSS when an example has another number of rows than answer tokens.
StatusOr<TeacherTables> LookUpTeacher(const TrainInputs& inputs, const TrainSettings& settings);

std::vector<int64_t> Lengths(const std::vector<data::EncodedExample>& examples);
// Indices of the leading examples that have at most `tokens` tokens together (0 = all); at least one where there is
// one.
std::vector<size_t> ValidationExamples(const std::vector<data::EncodedExample>& examples, int64_t tokens);

// Everything that decides the bits of a run, but not how it is cut into micro-batches or checkpoints.
nlohmann::json Fingerprint(const TrainInputs& inputs, const TrainSettings& settings);

}  // namespace refinery::train
