#include "server/jobs/stored_plan.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/gzip_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>

#include "refinery/v1/events.pb.h"

namespace refinery::jobs {
namespace {

constexpr int kMaxPlanBytes = 256 << 20;  // unpacked

}  // namespace

std::string PackPlan(const plan::Plan& plan) {
  v1::StoredPlan stored;
  for (const plan::PlannedTask& task : plan.tasks) {
    v1::StoredTask* out = stored.add_tasks();
    out->set_path(task.path);
    out->set_kind(task.kind);
    for (const plan::Input& input : task.inputs) {
      v1::StoredTask::Input* in = out->add_inputs();
      in->set_name(input.name);
      in->set_source(static_cast<uint32_t>(input.source));
      in->set_from(input.from);
    }
    *out->mutable_spec() = task.spec;
    out->mutable_spec()->clear_path();
    out->set_trial(task.trial < 0 ? 0 : static_cast<uint32_t>(task.trial));
    out->set_replicate(task.replicate < 0 ? 0 : static_cast<uint32_t>(task.replicate));
    for (const std::string& need : task.needs) out->add_needs(need);
    out->set_summary(task.summary);
  }
  std::string bytes;
  {
    google::protobuf::io::StringOutputStream stream(&bytes);
    google::protobuf::io::GzipOutputStream zip(&stream);
    google::protobuf::io::CodedOutputStream coded(&zip);
    coded.SetSerializationDeterministic(true);
    RF_CHECK(stored.SerializeToCodedStream(&coded));
  }
  return bytes;
}

StatusOr<plan::Plan> UnpackPlan(const std::string& bytes) {
  google::protobuf::io::ArrayInputStream stream(bytes.data(), static_cast<int>(bytes.size()));
  google::protobuf::io::GzipInputStream zip(&stream);
  google::protobuf::io::CodedInputStream coded(&zip);
  coded.SetTotalBytesLimit(kMaxPlanBytes);
  v1::StoredPlan stored;
  if (!stored.ParseFromCodedStream(&coded) || !coded.ConsumedEntireMessage()) return DataLoss("the stored plan is damaged");
  plan::Plan plan;
  plan.tasks.reserve(stored.tasks_size());
  for (v1::StoredTask& in : *stored.mutable_tasks()) {
    plan::PlannedTask& task = plan.tasks.emplace_back();
    task.path = in.path();
    task.kind = in.kind();
    for (const v1::StoredTask::Input& input : in.inputs()) {
      if (input.source() > static_cast<uint32_t>(plan::Input::Source::kStudyBest)) {
        return DataLoss("the stored plan has an input of an unknown source; it was written by a newer refineryd");
      }
      task.inputs.push_back({input.name(), static_cast<plan::Input::Source>(input.source()), input.from()});
    }
    task.spec.Swap(in.mutable_spec());
    task.spec.set_path(task.path);
    if (task.kind == v1::TRAIN) {
      task.trial = static_cast<int>(in.trial());
      task.replicate = static_cast<int>(in.replicate());
    }
    task.needs.assign(in.needs().begin(), in.needs().end());
    task.summary = in.summary();
  }
  return plan;
}

}  // namespace refinery::jobs
