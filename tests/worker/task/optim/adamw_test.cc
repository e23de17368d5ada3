#include "worker/task/runtime/torch.h"

#include "worker/task/optim/adamw.h"

#include <gtest/gtest.h>

#include <limits>

#include "tests/support/status_matchers.h"
#include "tests/worker/task/optim/peer.h"

namespace refinery::optim {
namespace {

using ::refinery::testing::IsOk;
using ::refinery::testing::MaxDifference;
using ::refinery::testing::TensorOf;

// Goal: torch's results. Method: ten steps stored by torch.optim.AdamW 2.11.0, two settings; equal to float32 rounding.
TEST(AdamWTest, GivesTorchsParameters) {
  int compared = 0;
  for (const nlohmann::json& peer_case : Peer()["cases"]) {
    if (peer_case["optimizer"] != "adamw") continue;
    const AdamWSettings settings{.beta1 = peer_case["betas"][0].get<double>(),
                                 .beta2 = peer_case["betas"][1].get<double>(),
                                 .epsilon = peer_case["eps"].get<double>(),
                                 .weight_decay = peer_case["weight_decay"].get<double>()};
    const double difference = ReplayDifference(peer_case, [&](std::vector<Parameter> parameters) {
      return std::make_unique<AdamW>(std::move(parameters), settings);
    });
    EXPECT_LT(difference, 1e-6);
    ++compared;
  }
  EXPECT_EQ(compared, 2);
}

TEST(AdamWTest, StateContinuesBitForBit) {
  const std::vector<Parameter> whole = PeerParameters();
  AdamW straight(whole, {.weight_decay = 0.1});
  Replay(straight, whole, 0.01, 0, 10);

  const std::vector<Parameter> halves = PeerParameters();
  AdamW first(halves, {.weight_decay = 0.1});
  Replay(first, halves, 0.01, 0, 4);
  AdamW second(halves, {.weight_decay = 0.1});
  ASSERT_THAT(second.LoadState(first.State()), IsOk());
  Replay(second, halves, 0.01, 4, 10);
  for (size_t i = 0; i < whole.size(); ++i) EXPECT_TRUE(at::equal(whole[i].value, halves[i].value)) << whole[i].name;
}

// Method: norm and gradients stored by torch.nn.utils.clip_grad_norm_.
TEST(ClipGradientsTest, ScalesAsTorchDoes) {
  const std::vector<Parameter> parameters = PeerParameters();
  SetPeerGradients(parameters, 0);
  const nlohmann::json& peer = Peer()["clip"];
  EXPECT_NEAR(ClipGradients(parameters, peer["max_norm"].get<double>()), peer["norm"].get<double>(), 1e-5);
  for (const Parameter& parameter : parameters) {
    const at::Tensor wanted = TensorOf(peer["clipped"][parameter.name], PeerShape(parameter.name));
    EXPECT_LT(MaxDifference(parameter.value.grad(), wanted), 1e-6);
  }
}

TEST(ClipGradientsTest, LeavesSmallAndUnboundedGradientsAlone) {
  const std::vector<Parameter> parameters = PeerParameters();
  SetPeerGradients(parameters, 0);
  const at::Tensor before = parameters[0].value.grad().clone();
  const double norm = ClipGradients(parameters, 1e6);
  EXPECT_EQ(ClipGradients(parameters, 0), norm);
  EXPECT_TRUE(at::equal(parameters[0].value.grad(), before));
  ZeroGradients(parameters);
  EXPECT_EQ(ClipGradients(parameters, 1), 0);
}

TEST(ClipGradientsTest, DoesNotSpreadAnInfiniteGradient) {
  const std::vector<Parameter> parameters = PeerParameters();
  SetPeerGradients(parameters, 0);
  parameters[0].value.mutable_grad()[0][0] = std::numeric_limits<float>::infinity();
  EXPECT_TRUE(std::isinf(ClipGradients(parameters, 1)));
  EXPECT_TRUE(at::isfinite(parameters[1].value.grad()).all().item<bool>());
  EXPECT_GT(parameters[1].value.grad().abs().max().item<float>(), 0.1f);
}

}  // namespace
}  // namespace refinery::optim
