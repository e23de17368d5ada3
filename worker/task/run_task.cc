#include "worker/task/runtime/torch.h"

#include <c10/util/Exception.h>

#include <new>

#include "worker/task/runtime/device.h"
#include "worker/task/tasks.h"

namespace refinery::task {
namespace {

Status Dispatch(const TaskSpec& spec, TaskContext& context) {
  struct Visitor {
    TaskContext& context;
    Status operator()(const ImportModelSpec& s) { return ImportModel(s, context); }
    Status operator()(const SynthesizeSpec& s) { return Synthesize(s, context); }
    Status operator()(const CritiqueSpec& s) { return Critique(s, context); }
    Status operator()(const CurateSpec& s) { return Curate(s, context); }
    Status operator()(const TeacherLogitsSpec& s) { return TeacherLogits(s, context); }
    Status operator()(const TrainSpec& s) { return Train(s, context); }
    Status operator()(const MergeSpec& s) { return Merge(s, context); }
    Status operator()(const QuantizeSpec& s) { return Quantize(s, context); }
    Status operator()(const RecoverSpec& s) { return Recover(s, context); }
    Status operator()(const EvaluateSpec& s) { return Evaluate(s, context); }
    Status operator()(const ExportSpec& s) { return Export(s, context); }
  };
  return std::visit(Visitor{context}, spec.params);
}

// The failure class decides whether and where the task is tried again (docs/architecture.md, "Failures").
const char* FailureClassOf(const Status& status) {
  switch (status.code()) {
    case absl::StatusCode::kInvalidArgument:
    case absl::StatusCode::kFailedPrecondition:
    case absl::StatusCode::kNotFound:
    case absl::StatusCode::kDataLoss:
    case absl::StatusCode::kUnimplemented:
      return "USER";
    case absl::StatusCode::kResourceExhausted:
      return "RESOURCE";
    case absl::StatusCode::kUnavailable:
    case absl::StatusCode::kCancelled:
      return "INFRA";
    case absl::StatusCode::kOutOfRange:
      return "NUMERIC";
    default:
      return "BUG";
  }
}

}  // namespace

Status Guarded(const std::function<Status()>& work) try {
  return work();
} catch (const runtime::CancelledException&) {
  return Cancelled("cancelled by the coordinator");
} catch (const runtime::NumericException& e) {
  return OutOfRange(e.what());
} catch (const c10::OutOfMemoryError& e) {
  return ResourceExhausted(e.what_without_backtrace());
} catch (const std::bad_alloc&) {
  return ResourceExhausted("out of memory");
} catch (const c10::Error& e) {
  return Internal(e.what_without_backtrace());
} catch (const std::exception& e) {
  return Internal(e.what());
}

Status RunTask(const TaskSpec& spec, TaskContext& context) {
  Status status = Guarded([&] { return Dispatch(spec, context); });
  if (!status.ok()) context.events.Error(FailureClassOf(status), status);
  context.events.Measure({.name = "peak_memory", .value = static_cast<double>(runtime::PeakMemoryBytes()), .count = 1, .unit = "bytes"});
  return status;
}

}  // namespace refinery::task
