#include "worker/task/runtime/torch.h"

#include "worker/task/recover/tunable_model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/status_matchers.h"
#include "tests/worker/task/recover/fixture.h"
#include "worker/task/quantize/quantized_artifact.h"
#include "worker/task/recover/divergence.h"

namespace refinery::recover {
namespace {

using refinery::testing::StatusIs;
using ::testing::HasSubstr;

model::PackedBatch Batch() {
  at::manual_seed(11);
  return {.token_ids = at::randint(0, 80, {30}, at::kLong), .lengths = {12, 18}};
}

at::Tensor KlOf(const at::Tensor& hidden, const at::Tensor& source_hidden, const at::Tensor& head) {
  const at::Tensor log_p = at::linear(source_hidden, head).log_softmax(1), log_q = at::linear(hidden, head).log_softmax(1);
  return (log_p.exp() * (log_p - log_q)).sum();
}

// Goal: the tunable model is the quantized model.  Method: a plain model with the dequantized weights, same bits; without gradient,
// as it is measured, for attention with one has another kernel.
TEST(TunableModelTest, ComputesWhatTheQuantizedModelComputes) {
  const at::NoGradGuard no_grad;
  const quantize::QuantizedModel quantized = Rounded();
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    const auto source = Source(type), plain = Source(type);
    ASSERT_THAT(quantize::ApplyQuantized(*plain, quantized), refinery::testing::IsOk());
    const auto tunable = TunableModel::Make(*source, quantized, true).value();
    EXPECT_TRUE(at::equal(tunable->Hidden(Batch()), plain->Hidden(Batch()))) << c10::toString(type);
  }
}

// Goal: gradients of scales and norms are right, those of the layers' distance to the source with them.  Method: a plain model in
// double whose weights are leaves of autograd: d L / d change = scale x sum over the group of d L / d w (code - zero); of a norm
// d L / d w x w.
TEST(TunableModelTest, GradientsAreThoseOfThePlainModel) {
  const quantize::QuantizedModel quantized = Rounded();
  const auto source = Source(at::kDouble), plain = Source(at::kDouble);
  ASSERT_THAT(quantize::ApplyQuantized(*plain, quantized), refinery::testing::IsOk());
  for (model::DecoderLayer& layer : plain->layers) {
    // Storages of their own, so that every weight is multiplied by itself.
    for (model::Linear* linear : layer.Linears()) linear->weight = linear->weight.clone().requires_grad_(true);
    for (at::Tensor* norm : {&layer.input_norm, &layer.post_attention_norm}) norm->requires_grad_(true);
  }
  plain->final_norm.requires_grad_(true);
  LayerTargets targets{.weight = 0.7};
  std::vector<at::Tensor> outputs;
  const at::Tensor source_hidden = source->Hidden(Batch(), &targets.outputs);
  at::Tensor loss = KlOf(plain->Hidden(Batch(), &outputs), source_hidden, source->lm_head).div(30);
  ASSERT_EQ(outputs.size(), plain->layers.size());
  for (size_t i = 0; i < outputs.size(); ++i) {
    const at::Tensor distance = (outputs[i] - targets.outputs[i]).square().sum(1) / targets.outputs[i].square().sum(1);
    loss = loss + distance.mean() * (0.7 / static_cast<double>(outputs.size()));
  }
  loss.backward();

  const auto tunable = TunableModel::Make(*source, quantized, true).value();
  const at::Tensor hidden = tunable->Hidden(Batch(), targets);
  hidden.backward(SumDivergence(hidden, source_hidden, source->lm_head, {.normalizer = 30}).gradient);
  std::map<std::string, at::Tensor> got;
  for (const auto& list : {tunable->scales(), tunable->norms()})
    for (const optim::Parameter& parameter : list) got[parameter.name] = parameter.value.grad();
  EXPECT_EQ(got.size(), 2u * 9 + 1);
  const auto check = [&](const std::string& name, const at::Tensor& wanted) {
    ASSERT_TRUE(got[name].defined()) << name;
    EXPECT_LT((got[name].to(at::kDouble) - wanted).abs().max().item<double>(), 1e-5 * wanted.abs().max().item<double>()) << name;
    EXPECT_GT(wanted.abs().max().item<double>(), 0) << name;
  };
  for (size_t i = 0; i < plain->layers.size(); ++i) {
    model::DecoderLayer& layer = plain->layers[i];
    for (const model::Linear* linear : layer.Linears()) {
      const quantize::QuantizedLinear& q = quantized.linears.at(linear->name);
      const at::Tensor products = linear->weight.grad() * (q.codes.to(at::kDouble) - 4);
      check(linear->name + ".scales", products.view({q.codes.size(0), -1, 16}).sum(2) * q.scales.to(at::kDouble));
    }
    const std::string prefix = Join("model.layers.", i, ".");
    check(prefix + "input_layernorm.weight", layer.input_norm.grad() * layer.input_norm.detach());
    check(prefix + "post_attention_layernorm.weight", layer.post_attention_norm.grad() * layer.post_attention_norm.detach());
  }
  check("model.norm.weight", plain->final_norm.grad() * plain->final_norm.detach());
}

// Goal: the gradient of a scale by finite differences, apart from any autograd.  Method: central differences in double of one
// group's weights moved along (code - zero).
TEST(TunableModelTest, GradientOfAScaleIsItsFiniteDifference) {
  const quantize::QuantizedModel quantized = Rounded();
  const auto source = Source(at::kDouble), plain = Source(at::kDouble);
  ASSERT_THAT(quantize::ApplyQuantized(*plain, quantized), refinery::testing::IsOk());
  const at::Tensor source_hidden = source->Hidden(Batch());
  const auto tunable = TunableModel::Make(*source, quantized, false).value();
  const at::Tensor hidden = tunable->Hidden(Batch());
  hidden.backward(SumDivergence(hidden, source_hidden, source->lm_head, {.normalizer = 1}).gradient);
  const at::NoGradGuard no_grad;
  for (const optim::Parameter& parameter : tunable->scales()) {
    const std::string name = parameter.name.substr(0, parameter.name.rfind('.'));
    const quantize::QuantizedLinear& q = quantized.linears.at(name);
    const int64_t row = 7, group = 2;
    const at::Tensor part = plain->FindLinear(name)->weight[row].slice(0, group * 16, group * 16 + 16);
    const at::Tensor direction = part.clone(), before = part.clone();  // scale x (code - zero)
    constexpr double kStep = 1e-5;
    part.copy_(before + kStep * direction);
    const double above = KlOf(plain->Hidden(Batch()), source_hidden, source->lm_head).item<double>();
    part.copy_(before - kStep * direction);
    const double below = KlOf(plain->Hidden(Batch()), source_hidden, source->lm_head).item<double>();
    part.copy_(before);
    const double largest = parameter.value.grad().abs().max().item<double>();
    EXPECT_NEAR(parameter.value.grad()[row][group].item<double>(), (above - below) / (2 * kStep), 1e-5 * largest) << name;
    EXPECT_EQ(q.group_size, 16);
  }
}

// Goal: what is stored is what is multiplied by.  Method: change the parameters, store, apply to a plain model, same bits.
TEST(TunableModelTest, StoredScalesGiveTheSameModel) {
  quantize::QuantizedModel quantized = Rounded();
  const auto source = Source(at::kBFloat16), plain = Source(at::kBFloat16);
  const auto tunable = TunableModel::Make(*source, quantized, false).value();
  {
    const at::NoGradGuard no_grad;
    at::manual_seed(2);
    for (const optim::Parameter& parameter : tunable->scales()) at::Tensor(parameter.value).normal_(0, 0.05);
  }
  tunable->Refresh();
  for (const auto& [module, scales] : tunable->StoredScales()) {
    EXPECT_EQ(scales.scalar_type(), at::kHalf);
    EXPECT_FALSE(at::equal(scales, quantized.linears.at(module).scales)) << module;
    quantized.linears.at(module).scales = scales;
  }
  ASSERT_THAT(quantize::ApplyQuantized(*plain, quantized), refinery::testing::IsOk());
  const at::NoGradGuard no_grad;
  EXPECT_TRUE(at::equal(tunable->Hidden(Batch()), plain->Hidden(Batch())));
  // The source is as it was.
  EXPECT_TRUE(at::equal(source->Hidden(Batch()), Source(at::kBFloat16)->Hidden(Batch())));
}

TEST(TunableModelTest, RefusesAnotherModelsArtifact) {
  const auto source = Source();
  quantize::QuantizedModel fewer = Rounded();
  fewer.linears.erase("model.layers.1.mlp.up_proj");
  EXPECT_THAT(TunableModel::Make(*source, fewer, false).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("model.layers.1.mlp.up_proj")));
  quantize::QuantizedModel more = Rounded();
  more.linears["model.layers.2.mlp.up_proj"] = more.linears["model.layers.1.mlp.up_proj"];
  EXPECT_THAT(TunableModel::Make(*source, more, false).status(), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("15 modules")));
  quantize::QuantizedModel other = Rounded();
  other.linears["model.layers.0.self_attn.o_proj"] = other.linears["model.layers.0.self_attn.k_proj"];
  EXPECT_THAT(TunableModel::Make(*source, other, false).status(),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("32 x 64, the source model's 64 x 64")));
}

}  // namespace
}  // namespace refinery::recover
