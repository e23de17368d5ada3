#include "worker/task/runtime/torch.h"

#include "worker/task/recover/divergence.h"

#include <gtest/gtest.h>

namespace refinery::recover {
namespace {

struct Problem {
  at::Tensor hidden, source, head;
};

// A vocabulary that is no multiple of a vector; logits up to about +-20.
Problem MakeProblem(at::ScalarType type) {
  at::manual_seed(5);
  return {(3 * at::randn({13, 24})).to(type), (3 * at::randn({13, 24})).to(type), at::randn({531, 24}).to(type)};
}

// Goal: value and gradient are those of the definition.  Method: autograd in double on the same (rounded) logits; several
// chunks; bfloat16 within its own rounding of the gradient.
TEST(DivergenceTest, ValueAndGradientAreThoseOfTheDefinition) {
  for (const auto& [type, value_bound, gradient_bound] :
       {std::tuple(at::kDouble, 1e-12, 1e-9), std::tuple(at::kFloat, 1e-6, 1e-5), std::tuple(at::kBFloat16, 1e-5, 1e-2)}) {
    const Problem p = MakeProblem(type);
    // The products are rounded to their type before the softmax; the oracle starts from the same values.
    const at::Tensor student = at::mm(p.hidden, p.head.t()).to(at::kDouble).requires_grad_(true);
    const at::Tensor log_p = at::mm(p.source, p.head.t()).to(at::kDouble).log_softmax(1);
    const at::Tensor kl = (log_p.exp() * (log_p - student.log_softmax(1))).sum();
    (kl / 13).backward();
    const at::Tensor wanted = at::mm(student.grad(), p.head.to(at::kDouble));
    const Divergence got = SumDivergence(p.hidden, p.source, p.head, {.normalizer = 13, .chunk = 5});
    EXPECT_NEAR(got.sum, kl.item<double>(), value_bound * kl.item<double>()) << c10::toString(type);
    EXPECT_LT((got.gradient.to(at::kDouble) - wanted).abs().max().item<double>(),
              gradient_bound * wanted.abs().max().item<double>())
        << c10::toString(type);
  }
}

TEST(DivergenceTest, IsZeroForTheSourceItselfAndWantsNoGradientByDefault) {
  const Problem p = MakeProblem(at::kFloat);
  const Divergence same = SumDivergence(p.source, p.source, p.head, {});
  EXPECT_NEAR(same.sum, 0, 1e-12);
  EXPECT_FALSE(same.gradient.defined());
}

// Goal: small divergences are not lost in rounding.  Method: hidden states 1e-3 apart, against double.
TEST(DivergenceTest, SmallDivergencesAreExact) {
  const Problem p = MakeProblem(at::kFloat);
  const at::Tensor near = p.source + 1e-3 * p.hidden;
  const double wanted = SumDivergence(near.to(at::kDouble), p.source.to(at::kDouble), p.head.to(at::kDouble), {}).sum;
  EXPECT_NEAR(SumDivergence(near, p.source, p.head, {}).sum, wanted, 5e-3 * wanted);
}

TEST(DivergenceTest, ANonFiniteLogitShows) {
  const Problem p = MakeProblem(at::kFloat);
  p.hidden[4][7] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_FALSE(std::isfinite(SumDivergence(p.hidden, p.source, p.head, {}).sum));
}

}  // namespace
}  // namespace refinery::recover
