#include "server/api/diff.h"

#include <google/protobuf/message.h>
#include <google/protobuf/text_format.h>

#include <map>
#include <string>

#include "common/status.h"

namespace refinery::api {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using Diff = v1::JobDiff::TaskDiff;

constexpr size_t kMaxValueBytes = 200;

std::string ValueOf(const Message& message, const FieldDescriptor* field) {
  std::string text;
  google::protobuf::TextFormat::Printer printer;
  printer.SetSingleLineMode(true);
  if (field->is_repeated()) {
    for (int i = 0; i < message.GetReflection()->FieldSize(message, field); ++i) {
      std::string one;
      printer.PrintFieldValueToString(message, field, i, &one);
      text += Join(i ? ", " : "", one);
    }
  } else {
    printer.PrintFieldValueToString(message, field, -1, &text);
  }
  return text.substr(0, kMaxValueBytes);
}

void AddCause(Diff* diff, const std::string& field, const std::string& before, const std::string& after,
              const std::string& because_of = "") {
  v1::JobDiff::Cause* cause = diff->add_causes();
  cause->set_field(field);
  cause->set_before(before);
  cause->set_after(after);
  cause->set_because_of(because_of);
}

// Every leaf that differs, as a cause.
void CompareFields(const Message& before, const Message& after, const std::string& prefix, Diff* diff) {
  for (int i = 0; i < before.GetDescriptor()->field_count(); ++i) {
    const FieldDescriptor* field = before.GetDescriptor()->field(i);
    const std::string name = Join(prefix, prefix.empty() ? "" : ".", field->name());
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE && !field->is_repeated()) {
      const bool had = before.GetReflection()->HasField(before, field), has = after.GetReflection()->HasField(after, field);
      if (had && has) {
        CompareFields(before.GetReflection()->GetMessage(before, field), after.GetReflection()->GetMessage(after, field), name, diff);
      } else if (had != has) {
        AddCause(diff, name, had ? ValueOf(before, field) : "", has ? ValueOf(after, field) : "");
      }
    } else if (const std::string was = ValueOf(before, field), is = ValueOf(after, field); was != is) {
      AddCause(diff, name, was, is);
    }
  }
}

// Input name -> digest, without the checkpoint that an attempt resumes from.
std::map<std::string, std::string> InputsOf(const v1::TaskSpec& spec) {
  std::map<std::string, std::string> inputs;
  for (const v1::ArtifactRef& input : spec.inputs()) {
    if (input.name() != "checkpoint") inputs[input.name()] = input.digest();
  }
  return inputs;
}

std::string MakerOf(const plan::PlannedTask& task, const std::string& input) {
  for (const plan::Input& one : task.inputs) {
    if (one.name != input) continue;
    if (one.source == plan::Input::Source::kFile) return Join("file ", one.from);
    return one.source == plan::Input::Source::kTask ? one.from : Join("the search's ", one.from, " trial");
  }
  return "";
}

void FindCauses(const jobs::TaskState& before, const jobs::TaskState& after, const plan::PlannedTask& planned, Diff* diff) {
  v1::TaskSpec was = before.spec, is = after.spec;
  std::map<std::string, std::string> old_inputs = InputsOf(was), new_inputs = InputsOf(is);
  for (v1::TaskSpec* spec : {&was, &is}) {
    spec->clear_job();
    spec->clear_path();
    spec->clear_threads();
    spec->clear_inputs();
    if (!plan::IsSeeded(planned.kind)) spec->clear_seed();
    if (spec->has_evaluate()) spec->mutable_evaluate()->clear_variant();
  }
  CompareFields(was, is, "", diff);
  for (const auto& [name, digest] : new_inputs) {
    const std::string old = old_inputs.contains(name) ? old_inputs.at(name) : "";
    if (old != digest) AddCause(diff, Join("inputs.", name), old, digest, MakerOf(planned, name));
  }
  for (const auto& [name, digest] : old_inputs) {
    if (!new_inputs.contains(name)) AddCause(diff, Join("inputs.", name), digest, "");
  }
}

Diff CompareTasks(const jobs::JobState& before_job, const jobs::JobState& after_job, size_t i) {
  const plan::PlannedTask& planned = after_job.plan.tasks[i];
  const jobs::TaskState& after = after_job.tasks[i];
  Diff diff;
  diff.set_path(planned.path);
  diff.set_kind(planned.kind);
  diff.set_seconds(after.state == v1::Task::CACHED ? 0 : after.seconds);
  const jobs::TaskState* before = before_job.Find(planned.path);
  const auto known = [](const jobs::TaskState& task) {
    return task.state != v1::Task::BLOCKED && task.spec.params_case() != v1::TaskSpec::PARAMS_NOT_SET;
  };
  const auto ended = [](const jobs::TaskState& task) {
    return task.state == v1::Task::DONE || task.state == v1::Task::CACHED || task.state == v1::Task::DEAD;
  };
  if (before == nullptr) {
    diff.set_change(Diff::ADDED);
  } else if (!known(*before) || !known(after)) {
    diff.set_change(Diff::NOT_REACHED);
  } else {
    FindCauses(*before, after, planned, &diff);
    const bool same_digest = before->digest == after.digest;
    const std::string was = before_job.created.code_version(), is = after_job.created.code_version();
    if (!same_digest && diff.causes().empty()) AddCause(&diff, "code_version", was, is);
    if (!diff.causes().empty()) {
      diff.set_change(Diff::CHANGED);
    } else if (!ended(*before) || !ended(after)) {
      diff.set_change(Diff::NOT_REACHED);
    } else {
      diff.set_change(after.state == v1::Task::CACHED ? Diff::SAME : Diff::RAN_AGAIN);
    }
  }
  return diff;
}

}  // namespace

v1::JobDiff DiffJobs(const jobs::JobState& before, const jobs::JobState& after) {
  v1::JobDiff diff;
  diff.set_before(before.id);
  diff.set_after(after.id);
  for (size_t i = 0; i < after.tasks.size(); ++i) *diff.add_tasks() = CompareTasks(before, after, i);
  for (const plan::PlannedTask& task : before.plan.tasks) {
    if (after.Find(task.path) != nullptr) continue;
    Diff* removed = diff.add_tasks();
    removed->set_path(task.path);
    removed->set_kind(task.kind);
    removed->set_change(Diff::REMOVED);
  }
  return diff;
}

}  // namespace refinery::api
