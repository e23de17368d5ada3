#include <gtest/gtest.h>

#include "common/digest.h"
#include "server/plan/plan.h"

namespace refinery::plan {
namespace {

v1::TaskSpec TrainSpec() {
  v1::TaskSpec spec;
  spec.set_job("job-1");
  spec.set_path("trial/0/replicate/0");
  spec.set_seed(7);
  spec.mutable_train()->set_steps(20);
  spec.mutable_train()->mutable_settings()->set_learning_rate(0.1);
  for (const char* name : {"student", "examples", "logits"}) {
    v1::ArtifactRef* input = spec.add_inputs();
    input->set_name(name);
    input->set_digest(DigestOf(name));
    input->set_size(10);
  }
  return spec;
}

v1::TaskSpec EvaluateSpec() {
  v1::TaskSpec spec = TrainSpec();
  spec.mutable_evaluate()->set_variant("student");
  spec.mutable_evaluate()->set_latency_tokens(32);
  return spec;
}

std::string Digest(const v1::TaskSpec& spec) { return TaskDigest(spec, "1.0"); }

TEST(TaskDigestTest, LeavesOutWhatDoesNotChangeTheOutput) {
  const std::string digest = Digest(TrainSpec());
  EXPECT_TRUE(IsDigest(digest));
  v1::TaskSpec spec = TrainSpec();
  spec.set_job("job-2");
  spec.set_path("trial/3/replicate/1");
  spec.set_threads(2);
  spec.mutable_inputs(0)->set_size(99);
  spec.mutable_inputs()->SwapElements(0, 2);
  v1::ArtifactRef* checkpoint = spec.add_inputs();
  checkpoint->set_name("checkpoint");
  checkpoint->set_digest(DigestOf("half way"));
  EXPECT_EQ(Digest(spec), digest);
}

TEST(TaskDigestTest, ChangesWithEverythingElse) {
  const v1::TaskSpec base = TrainSpec();
  v1::TaskSpec seed = base;
  seed.set_seed(8);
  v1::TaskSpec parameter = base;
  parameter.mutable_train()->mutable_settings()->set_learning_rate(0.2);
  v1::TaskSpec content = base;
  content.mutable_inputs(1)->set_digest(DigestOf("other"));
  v1::TaskSpec name = base;
  name.mutable_inputs(1)->set_name("other");
  v1::TaskSpec fewer = base;
  fewer.mutable_inputs()->RemoveLast();
  for (const v1::TaskSpec& other : {seed, parameter, content, name, fewer}) EXPECT_NE(Digest(other), Digest(base));
  EXPECT_NE(TaskDigest(base, "1.1"), Digest(base));
  // Two inputs that swap their contents are another task.
  v1::TaskSpec swapped = base;
  swapped.mutable_inputs(0)->set_digest(base.inputs(1).digest());
  swapped.mutable_inputs(1)->set_digest(base.inputs(0).digest());
  EXPECT_NE(Digest(swapped), Digest(base));
}

TEST(TaskDigestTest, EvaluationsIgnoreVariantAndSeed) {
  v1::TaskSpec other = EvaluateSpec();
  other.mutable_evaluate()->set_variant("refined");
  other.set_seed(99);
  EXPECT_EQ(Digest(other), Digest(EvaluateSpec()));
  other.mutable_evaluate()->set_latency_tokens(64);
  EXPECT_NE(Digest(other), Digest(EvaluateSpec()));
}

TEST(TaskDigestTest, KindsWithEqualParametersDiffer) {
  v1::TaskSpec merge;
  merge.mutable_merge();
  v1::TaskSpec quantize;
  quantize.mutable_quantize();
  EXPECT_NE(Digest(merge), Digest(quantize));
}

TEST(TaskDigestTest, ImportsAreNeverReused) {
  EXPECT_FALSE(IsReusable(v1::IMPORT_MODEL));
  EXPECT_TRUE(IsReusable(v1::TRAIN));
  EXPECT_FALSE(IsSeeded(v1::EVALUATE));
  EXPECT_TRUE(IsSeeded(v1::TRAIN));
}

}  // namespace
}  // namespace refinery::plan
