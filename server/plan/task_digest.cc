#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>

#include <algorithm>

#include "common/digest.h"
#include "server/plan/plan.h"

namespace refinery::plan {
namespace {

v1::TaskKind KindOf(const v1::TaskSpec& spec) {
  switch (spec.params_case()) {
    case v1::TaskSpec::kImportModel: return v1::IMPORT_MODEL;
    case v1::TaskSpec::kSynthesize: return v1::SYNTHESIZE;
    case v1::TaskSpec::kCritique: return v1::CRITIQUE;
    case v1::TaskSpec::kCurate: return v1::CURATE;
    case v1::TaskSpec::kTeacherLogits: return v1::TEACHER_LOGITS;
    case v1::TaskSpec::kTrain: return v1::TRAIN;
    case v1::TaskSpec::kMerge: return v1::MERGE;
    case v1::TaskSpec::kQuantize: return v1::QUANTIZE;
    case v1::TaskSpec::kEvaluate: return v1::EVALUATE;
    case v1::TaskSpec::kExport: return v1::EXPORT;
    case v1::TaskSpec::kRecover: return v1::RECOVER;
    case v1::TaskSpec::PARAMS_NOT_SET: break;
  }
  return v1::TASK_KIND_UNSPECIFIED;
}

// Protobuf promises no fixed bytes unless it is asked to be deterministic (map fields).
std::string DeterministicBytes(const v1::TaskSpec& spec) {
  std::string bytes;
  {
    google::protobuf::io::StringOutputStream stream(&bytes);
    google::protobuf::io::CodedOutputStream coded(&stream);
    coded.SetSerializationDeterministic(true);
    RF_CHECK(spec.SerializeToCodedStream(&coded));
  }
  return bytes;
}

}  // namespace

bool IsSeeded(v1::TaskKind kind) {
  return kind == v1::SYNTHESIZE || kind == v1::CRITIQUE || kind == v1::CURATE || kind == v1::TEACHER_LOGITS ||
         kind == v1::TRAIN || kind == v1::RECOVER;
}

bool IsReusable(v1::TaskKind kind) { return kind != v1::IMPORT_MODEL && kind != v1::TASK_KIND_UNSPECIFIED; }

std::string TaskDigest(const v1::TaskSpec& spec, const std::string& code_version) {
  v1::TaskSpec identity = spec;
  identity.DiscardUnknownFields();
  identity.clear_job();
  identity.clear_path();
  identity.clear_threads();
  if (!IsSeeded(KindOf(spec))) identity.clear_seed();
  if (identity.has_evaluate()) identity.mutable_evaluate()->clear_variant();

  std::vector<std::pair<std::string, std::string>> inputs;
  for (const v1::ArtifactRef& input : spec.inputs())
    if (input.name() != "checkpoint") inputs.emplace_back(input.name(), input.digest());
  std::sort(inputs.begin(), inputs.end());
  identity.clear_inputs();
  for (const auto& [name, digest] : inputs) {
    v1::ArtifactRef* input = identity.add_inputs();
    input->set_name(name);
    input->set_digest(digest);
  }
  return DigestOf(Join("refinery task 1\n", code_version, "\n", DeterministicBytes(identity)));
}

}  // namespace refinery::plan
