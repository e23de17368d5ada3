#include "worker/task/runtime/torch.h"

#include "worker/task/distill/kd_loss.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "tests/support/vectors.h"
#include "worker/task/distill/tail_grid.h"

namespace refinery::distill {
namespace {

using ::refinery::testing::MaxDifference;
using ::refinery::testing::ReadVectors;
using ::refinery::testing::TensorOf;

at::Tensor Random(at::IntArrayRef shape, uint64_t seed) {
  return at::randn(shape, at::detail::createCPUGenerator(seed), at::TensorOptions(at::kFloat));
}

// The cache rows of a dense teacher.
TeacherRows RowsOf(const at::Tensor& logits, int64_t k) {
  const at::Tensor log_p = logits.to(at::kDouble).log_softmax(1);
  const auto [top, ids] = log_p.topk(k, 1);
  const at::Tensor rest = log_p.scatter(1, ids, -std::numeric_limits<double>::infinity());
  std::vector<at::Tensor> grid;
  for (const double inverse : kInverseTemperatures) grid.push_back((rest * inverse).logsumexp({1}));
  return {ids.to(at::kInt), top.to(at::kFloat), rest.logsumexp({1}).to(at::kFloat), at::stack(grid, 1).to(at::kFloat)};
}

struct Problem {
  at::Tensor hidden;   // [N, H]
  at::Tensor head;     // [V, H]
  at::Tensor targets;  // [N]
  TeacherRows teacher;
  at::Tensor teacher_logits;
};

// A vocabulary that is no multiple of a vector, and answer tokens in and out of the teacher's entries.
Problem MakeProblem(int64_t n, int64_t vocabulary, int64_t k, at::ScalarType type) {
  Problem problem;
  problem.hidden = Random({n, 16}, 1).to(type).requires_grad_(true);
  problem.head = Random({vocabulary, 16}, 2).to(type);
  problem.teacher_logits = 3 * Random({n, vocabulary}, 3);
  problem.teacher = RowsOf(problem.teacher_logits, k);
  problem.targets = at::arange(n) * 7 % vocabulary;
  problem.targets[0] = problem.teacher.ids[0][0].item<int64_t>();
  return problem;
}

struct Reference {
  at::Tensor loss, kl, cross_entropy;
};

// Dense float64 with autograd: temper both sides whole, sum the rest into one bucket, textbook KL.
Reference DenseReference(const at::Tensor& hidden, const Problem& problem, const KdSettings& settings) {
  const at::Tensor logits = hidden.matmul(problem.head.to(at::kDouble).t());
  const at::Tensor ids = problem.teacher.ids.to(at::kLong);
  const at::Tensor outside = at::ones_like(logits).scatter(1, ids, 0.0);
  const at::Tensor p_t = (problem.teacher_logits.to(at::kDouble) / settings.temperature).softmax(1);
  const at::Tensor q_t = (logits / settings.temperature).softmax(1);
  const auto buckets = [&](const at::Tensor& x) { return at::cat({x.gather(1, ids), (x * outside).sum(1, true)}, 1); };
  const at::Tensor p_b = buckets(p_t);
  Reference result;
  result.kl = (p_b * (p_b / buckets(q_t)).log()).sum(1).mean();
  result.cross_entropy = -logits.log_softmax(1).gather(1, problem.targets.unsqueeze(1)).mean();
  result.loss = settings.kl_weight * settings.temperature * settings.temperature * result.kl +
                (1 - settings.kl_weight) * result.cross_entropy;
  return result;
}

at::Tensor GradientOf(const at::Tensor& loss, const at::Tensor& hidden) {
  hidden.mutable_grad().reset();
  loss.backward();
  return hidden.grad().clone();
}

double RelativeError(const at::Tensor& value, const at::Tensor& wanted) {
  return MaxDifference(value, wanted) / wanted.abs().max().item<double>();
}

std::vector<KdSettings> ManySettings() {
  return {{1.0, 1.0}, {1.0, 2.0}, {0.75, 0.5}, {0.25, 1.0}, {0.5, 4.0}, {0.0, 1.0}};
}

// Goal: value and gradient of every term. Method: numbers stored by PyTorch's autograd in float64, for the fused kernel
// (float32) and the ATen path (float64).
TEST(KdLossTest, GivesPyTorchsLossAndGradient) {
  const nlohmann::json peer = ReadVectors("distill/kd.json");
  const int64_t n = peer["n"], h = peer["h"], v = peer["v"], k = peer["k"];
  for (const auto& [type, tolerance] : {std::pair(at::kFloat, 2e-6), std::pair(at::kDouble, 2e-7)}) {
    const at::Tensor hidden = TensorOf(peer["hidden"], {n, h}).to(type).requires_grad_(true);
    const at::Tensor head = TensorOf(peer["head"], {v, h}).to(type);
    const TeacherRows teacher = RowsOf(TensorOf(peer["teacher"], {n, v}), k);
    const at::Tensor targets = at::tensor(peer["targets"].get<std::vector<int64_t>>());
    for (const nlohmann::json& wanted : peer["cases"]) {
      const KdSettings settings{.kl_weight = wanted["kl_weight"], .temperature = wanted["temperature"]};
      const KdResult result = KdLoss(hidden, head, targets, teacher, settings);
      EXPECT_NEAR(result.loss.item<double>(), wanted["loss"].get<double>(), 10 * tolerance);
      EXPECT_NEAR(result.kl, wanted["kl"].get<double>(), tolerance);
      EXPECT_NEAR(result.cross_entropy, wanted["cross_entropy"].get<double>(), 2 * tolerance);
      EXPECT_LT(RelativeError(GradientOf(result.loss, hidden), TensorOf(wanted["gradient"], {n, h})), 5 * tolerance);
    }
  }
}

// Goal: the same over a vocabulary of several vectors and chunks. Method: dense float64 reference under autograd.
TEST(KdLossTest, MatchesADenseReferenceOverLongRows) {
  for (const KdSettings& settings : ManySettings()) {
    const Problem problem = MakeProblem(9, 3001, 64, at::kFloat);
    const at::Tensor exact = problem.hidden.detach().to(at::kDouble).requires_grad_(true);
    const Reference wanted = DenseReference(exact, problem, settings);
    const at::Tensor gradient = GradientOf(wanted.loss, exact);
    const KdResult result = KdLoss(problem.hidden, problem.head, problem.targets, problem.teacher, settings);
    EXPECT_NEAR(result.kl, wanted.kl.item<double>(), 1e-5);
    EXPECT_NEAR(result.cross_entropy, wanted.cross_entropy.item<double>(), 1e-5);
    EXPECT_LT(RelativeError(GradientOf(result.loss, problem.hidden), gradient), 2e-5) << settings.temperature;
  }
}

// Goal: bfloat16 loses no more than its own rounding. Method: the float64 reference from the same bfloat16 inputs.
TEST(KdLossTest, Bfloat16StaysWithinItsRounding) {
  for (const KdSettings& settings : ManySettings()) {
    const Problem problem = MakeProblem(32, 3001, 64, at::kBFloat16);
    const at::Tensor exact = problem.hidden.detach().to(at::kDouble).requires_grad_(true);
    const Reference wanted = DenseReference(exact, problem, settings);
    const at::Tensor gradient = GradientOf(wanted.loss, exact);
    const KdResult result = KdLoss(problem.hidden, problem.head, problem.targets, problem.teacher, settings);
    EXPECT_NEAR(result.kl / wanted.kl.item<double>(), 1, 0.01);
    EXPECT_NEAR(result.cross_entropy / wanted.cross_entropy.item<double>(), 1, 0.01);
    EXPECT_LT(RelativeError(GradientOf(result.loss, problem.hidden), gradient), 0.02) << settings.temperature;
  }
}

// Goal: no loss, no gradient where the student is the teacher. Method: closed form (0) at T = 1; top-k cut included.
TEST(KdLossTest, IsZeroWhenTheStudentIsTheTeacher) {
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kDouble}) {
    Problem problem = MakeProblem(8, 777, 32, type);
    problem.teacher = RowsOf(problem.hidden.detach().matmul(problem.head.t()), 32);
    const KdResult result = KdLoss(problem.hidden, problem.head, problem.targets, problem.teacher, {});
    EXPECT_GE(result.kl, 0);
    EXPECT_LT(result.kl, 1e-11) << type;
    EXPECT_LT(GradientOf(result.loss, problem.hidden).abs().max().item<double>(), 1e-6) << type;
  }
}

// Goal: never negative, also a hair's breadth from the optimum. Method: 200 seeded perturbations of every size.
TEST(KdLossTest, IsNeverNegative) {
  Problem problem = MakeProblem(8, 777, 32, at::kFloat);
  problem.teacher = RowsOf(problem.hidden.detach().matmul(problem.head.t()), 32);
  for (uint64_t i = 0; i < 200; ++i) {
    const double size = std::pow(10.0, -8 + static_cast<double>(i) / 25);
    const at::Tensor hidden = problem.hidden.detach() + size * Random({8, 16}, 100 + i);
    const double kl = KdLoss(hidden, problem.head, problem.targets, problem.teacher, {}).kl;
    EXPECT_GE(kl, 0);
    if (size > 1e-3) {
      EXPECT_GT(kl, 0);
    }
  }
}

// Goal: chunks do not matter. Method: every chunk size from 1 to beyond N.
TEST(KdLossTest, DoesNotDependOnTheChunk) {
  const Problem problem = MakeProblem(10, 501, 16, at::kFloat);
  const KdSettings base{.kl_weight = 0.7, .temperature = 2};
  const KdResult whole = KdLoss(problem.hidden, problem.head, problem.targets, problem.teacher, base);
  const at::Tensor gradient = GradientOf(whole.loss, problem.hidden);
  for (int64_t chunk = 1; chunk < 10; ++chunk) {
    const KdSettings settings{.kl_weight = 0.7, .temperature = 2, .chunk = chunk};
    const KdResult result = KdLoss(problem.hidden, problem.head, problem.targets, problem.teacher, settings);
    EXPECT_NEAR(result.loss.item<double>(), whole.loss.item<double>(), 1e-5);
    EXPECT_LT(RelativeError(GradientOf(result.loss, problem.hidden), gradient), 1e-5);
  }
}

// Goal: micro-batches with the step's normalizer add up to the step. Method: 10 positions as 3 + 7 (and an empty one).
TEST(KdLossTest, MicroBatchesAddUp) {
  const Problem problem = MakeProblem(10, 501, 16, at::kFloat);
  const KdSettings settings{.kl_weight = 0.7, .temperature = 2};
  const KdResult whole = KdLoss(problem.hidden, problem.head, problem.targets, problem.teacher, settings);
  const at::Tensor gradient = GradientOf(whole.loss, problem.hidden);
  problem.hidden.mutable_grad().reset();
  double loss = 0, kl = 0;
  for (const auto& [begin, count] : {std::pair(0, 3), std::pair(3, 0), std::pair(3, 7)}) {
    const TeacherRows part{problem.teacher.ids.narrow(0, begin, count), problem.teacher.logits.narrow(0, begin, count),
                           problem.teacher.tail_logits.narrow(0, begin, count),
                           problem.teacher.tail_log_partitions.narrow(0, begin, count)};
    const KdResult result = KdLoss(problem.hidden.narrow(0, begin, count), problem.head,
                                   problem.targets.narrow(0, begin, count), part, settings, 10);
    result.loss.backward();
    loss += result.loss.item<double>();
    kl += result.kl;
  }
  EXPECT_NEAR(loss, whole.loss.item<double>(), 1e-5);
  EXPECT_NEAR(kl, whole.kl, 1e-6);
  EXPECT_LT(RelativeError(problem.hidden.grad(), gradient), 1e-5);
}

// Goal: the T^2 of Hinton et al.: with it the gradient does not fade. Method: their limit of a temperature high against
// the logits, in which T^2 dKL_T/dz -> (z - v) / V for centred logits z, v; K = V - 1, so that every logit is compared.
TEST(KdLossTest, ReachesTheHighTemperatureLimit) {
  const int64_t v = 12;
  const at::Tensor head = at::eye(v, at::kDouble);
  const at::Tensor z = (0.02 * Random({1, v}, 5)).to(at::kDouble).requires_grad_(true);
  const at::Tensor t = (0.02 * Random({1, v}, 6)).to(at::kDouble);
  const KdResult result = KdLoss(z, head, at::zeros({1}, at::kLong), RowsOf(t, v - 1), {.temperature = 8});
  const at::Tensor centred = z.detach() - z.detach().mean() - (t - t.mean());
  EXPECT_LT(RelativeError(GradientOf(result.loss, z), centred / v), 1e-2);
  EXPECT_NEAR(result.loss.item<double>() / ((centred * centred).sum().item<double>() / (2 * v)), 1, 1e-2);
  EXPECT_NEAR(result.loss.item<double>() / (64 * result.kl), 1, 1e-12);
}

// Goal: a tail far below float32's resolution of 1 still counts. Method: closed form; outside mass e^-40, entries flat.
TEST(KdLossTest, SeesATinyOutsideMass) {
  const at::Tensor logits = at::tensor({0.0f, 0.0f, -40.0f, -40.0f}).unsqueeze(0).requires_grad_(true);
  const at::Tensor teacher_logits = at::tensor({0.0, 0.0, -30.0, -30.0}, at::kDouble).unsqueeze(0);
  const KdResult result = KdLoss(logits, at::eye(4), at::zeros({1}, at::kLong), RowsOf(teacher_logits, 2), {});
  const double p = std::exp(-30.0);
  EXPECT_NEAR(result.kl / (p * 10 - p + std::exp(-40.0)), 1, 1e-5);
  EXPECT_NEAR(GradientOf(result.loss, logits)[0][2].item<double>() / -(p - std::exp(-40.0)) * 2, 1, 1e-4);
}

TEST(KdLossTest, CoversTheWholeVocabulary) {  // K = V: no tail on either side
  Problem problem = MakeProblem(4, 40, 40, at::kFloat);
  const at::Tensor exact = problem.hidden.detach().to(at::kDouble).requires_grad_(true);
  const at::Tensor p = problem.teacher_logits.to(at::kDouble).log_softmax(1);
  const at::Tensor q = exact.matmul(problem.head.to(at::kDouble).t()).log_softmax(1);
  const at::Tensor wanted = (p.exp() * (p - q)).sum(1).mean();
  const at::Tensor gradient = GradientOf(wanted, exact);
  for (const at::ScalarType type : {at::kFloat, at::kDouble}) {
    const at::Tensor hidden = problem.hidden.detach().to(type).requires_grad_(true);
    const KdResult result = KdLoss(hidden, problem.head.to(type), problem.targets, problem.teacher, {});
    EXPECT_NEAR(result.kl, wanted.item<double>(), 1e-5);
    EXPECT_LT(RelativeError(GradientOf(result.loss, hidden), gradient), 1e-5);
  }
}

TEST(KdLossTest, NeedsNoTeacherForCrossEntropy) {
  const Problem problem = MakeProblem(6, 301, 16, at::kFloat);
  const KdResult with = KdLoss(problem.hidden, problem.head, problem.targets, problem.teacher, {.kl_weight = 0});
  const at::Tensor gradient = GradientOf(with.loss, problem.hidden);
  const KdResult without = KdLoss(problem.hidden, problem.head, problem.targets, {}, {.kl_weight = 0});
  EXPECT_NEAR(with.loss.item<double>(), without.loss.item<double>(), 1e-6);
  EXPECT_EQ(without.kl, 0);
  EXPECT_GT(with.kl, 0);
  EXPECT_LT(RelativeError(GradientOf(without.loss, problem.hidden), gradient), 1e-5);
}

TEST(KdLossTest, LeavesNonFiniteValuesVisible) {
  const Problem problem = MakeProblem(3, 301, 16, at::kFloat);
  const at::Tensor hidden = problem.hidden.detach().clone();
  hidden[1][2] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_FALSE(std::isfinite(KdLoss(hidden, problem.head, problem.targets, problem.teacher, {}).kl));
}

TEST(KdLossTest, RefusesIdsOutsideTheVocabulary) {
  Problem problem = MakeProblem(3, 301, 16, at::kFloat);
  const at::Tensor targets = problem.targets.clone();
  targets[2] = 301;
  EXPECT_THROW(KdLoss(problem.hidden, problem.head, targets, problem.teacher, {}), c10::Error);
  problem.teacher.ids[0][3] = -1;
  EXPECT_THROW(KdLoss(problem.hidden, problem.head, problem.targets, problem.teacher, {}), c10::Error);
  EXPECT_THROW(KdLoss(problem.hidden, problem.head, problem.targets, {}, {}), c10::Error);
}

TEST(KdLossTest, RefusesATemperatureOutsideTheGrid) {
  const Problem problem = MakeProblem(3, 301, 16, at::kFloat);
  for (const double temperature : {0.49, 8.01}) {
    EXPECT_THROW(KdLoss(problem.hidden, problem.head, problem.targets, problem.teacher, {.temperature = temperature}),
                 c10::Error);
  }
  TeacherRows without = problem.teacher;
  without.tail_log_partitions = at::Tensor();
  EXPECT_THROW(KdLoss(problem.hidden, problem.head, problem.targets, without, {.temperature = 2}), c10::Error);
  EXPECT_GT(KdLoss(problem.hidden, problem.head, problem.targets, without, {}).kl, 0);
}

}  // namespace
}  // namespace refinery::distill
