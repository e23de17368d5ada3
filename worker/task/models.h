// worker/task/models.h
//
// The models of a task, from its inputs: a model reference resolved in the worker's cache, with the adapter merged and the
// quantized weights put in where the task has such inputs. The same inputs give the same bits on every worker.

#pragma once

#include <functional>
#include <memory>
#include <string>

#include "common/status.h"
#include "worker/task/checkpoint/import.h"
#include "worker/task/checkpoint/model_folder.h"
#include "worker/task/context.h"
#include "worker/task/model/causal_lm.h"
#include "worker/task/tokenizer/tokenizer.h"

namespace refinery::task {

struct ResolvedModel {
  checkpoint::ModelRef ref;
  std::shared_ptr<checkpoint::ModelFolder> folder;
};

// The model that input `name` refers to (its model_ref.json). NOT_FOUND, FAILED_PRECONDITION when the source changed.
StatusOr<ResolvedModel> ResolveInput(const TaskContext& context, const std::string& name);

// Loads it on the default device in the compute type and merges input "adapter" where present.
StatusOr<std::shared_ptr<model::CausalLm>> LoadMerged(const TaskContext& context, const ResolvedModel& resolved);

// The same; applies input "quantized" where present.
StatusOr<std::shared_ptr<model::CausalLm>> LoadVariant(const TaskContext& context, const ResolvedModel& resolved);

// The same model a layer at a time, for one that may be larger than memory: `lm` has embeddings, final norm and head, `layer` reads
// one decoder layer with the input "adapter" merged. INVALID_ARGUMENT for an adapter that names other modules or sizes.
struct StreamedModel {
  std::shared_ptr<model::CausalLm> lm;
  std::function<StatusOr<model::DecoderLayer>(int64_t index)> layer;
};
StatusOr<StreamedModel> OpenStreamed(const TaskContext& context, const ResolvedModel& resolved);

// FAILED_PRECONDITION (a user's mistake) when the two tokenizers differ; says in what.
Status CheckSameTokenizer(const ResolvedModel& teacher, const ResolvedModel& student);

}  // namespace refinery::task
