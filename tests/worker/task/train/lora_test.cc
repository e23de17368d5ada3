#include "worker/task/runtime/torch.h"

#include "worker/task/train/lora.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>

#include "tests/support/status_matchers.h"
#include "tests/worker/task/train/fixture.h"

namespace refinery::train {
namespace {

using ::refinery::testing::IsOk;
using ::refinery::testing::StatusIs;
using ::testing::HasSubstr;

// Goal: PEFT's start. Method: closed form of a uniform distribution on +-1/sqrt(in): bounds, mean, variance 1/(3 in).
TEST(LoraFactorsTest, StartsAsPeftDoes) {
  const auto student = TinyModel(1);
  const LoraFactors factors(student.get(), 16, 32, 5);
  ASSERT_EQ(factors.parameters().size(), 2u * 7 * 2);
  for (const optim::Parameter& parameter : factors.parameters()) {
    const at::Tensor value = parameter.value.detach();
    EXPECT_TRUE(parameter.value.requires_grad() && parameter.value.is_leaf());
    if (parameter.name.ends_with(".lora_B")) {
      EXPECT_EQ(value.abs().max().item<float>(), 0) << parameter.name;
      continue;
    }
    const double in = static_cast<double>(value.size(1));
    EXPECT_EQ(value.size(0), 16);
    EXPECT_LE(value.abs().max().item<double>(), 1 / std::sqrt(in));
    EXPECT_GT(value.abs().max().item<double>(), 0.95 / std::sqrt(in));
    EXPECT_NEAR(value.mean().item<double>() * std::sqrt(in), 0, 0.1);
    EXPECT_NEAR(value.var().item<double>() * 3 * in, 1, 0.2);
  }
  EXPECT_FALSE(at::equal(factors.parameters()[0].value, factors.parameters()[2].value)) << "q and k start alike";
  EXPECT_DOUBLE_EQ(student->layers[0].q.lora_scale, 2.0);
}

TEST(LoraFactorsTest, CopiesOutAndIn) {
  const auto student = TinyModel(1);
  checkpoint::PeftAdapter adapter;
  {
    LoraFactors factors(student.get(), 4, 8, 5);
    adapter = factors.ToAdapter("base");
    const at::NoGradGuard no_grad;
    student->layers[0].q.lora_a.zero_();  // the copy does not follow
  }
  EXPECT_FALSE(student->layers[0].q.lora_a.defined());
  EXPECT_EQ(adapter.base_model, "base");
  EXPECT_GT(adapter.pairs.at("model.layers.0.self_attn.q_proj").a.abs().max().item<float>(), 0);
  LoraFactors other(student.get(), 4, 8, 6);
  ASSERT_THAT(other.Load(adapter), IsOk());
  EXPECT_TRUE(SameBits(other.ToAdapter("base"), adapter));

  adapter.pairs["model.layers.1.mlp.up_proj"].a = at::zeros({4, 5});
  EXPECT_THAT(other.Load(adapter), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("model.layers.1.mlp.up_proj")));
  adapter.pairs.erase("model.layers.1.mlp.up_proj");
  EXPECT_THAT(other.Load(adapter), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("13 layers")));
}

}  // namespace
}  // namespace refinery::train
