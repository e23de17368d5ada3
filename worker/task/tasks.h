// worker/task/tasks.h
//
// One function per task kind. Each reads context.inputs, writes context.outputs and reports through context.events.
//
// Errors: INVALID_ARGUMENT, FAILED_PRECONDITION and NOT_FOUND are the user's and never retried; tensor code throws, and
// RunTask is the one place that catches. Inputs and outputs are listed in proto/refinery/v1/task.proto.

#pragma once

#include <functional>

#include "common/status.h"
#include "worker/task/context.h"
#include "worker/task/spec.h"

namespace refinery::task {

Status ImportModel(const ImportModelSpec& spec, TaskContext& context);
Status Synthesize(const SynthesizeSpec& spec, TaskContext& context);
Status Critique(const CritiqueSpec& spec, TaskContext& context);
Status Curate(const CurateSpec& spec, TaskContext& context);
Status TeacherLogits(const TeacherLogitsSpec& spec, TaskContext& context);
Status Train(const TrainSpec& spec, TaskContext& context);
Status Merge(const MergeSpec& spec, TaskContext& context);
Status Quantize(const QuantizeSpec& spec, TaskContext& context);
Status Recover(const RecoverSpec& spec, TaskContext& context);
Status Evaluate(const EvaluateSpec& spec, TaskContext& context);
Status Export(const ExportSpec& spec, TaskContext& context);

// What `work` returns, or the exception it threw as a Status. The only catch of the program.
Status Guarded(const std::function<Status()>& work);
// Runs one task; writes the TaskEvent `error` when it fails.
Status RunTask(const TaskSpec& spec, TaskContext& context);

}  // namespace refinery::task
