#include "worker/task/runtime/torch.h"

#include "worker/task/optim/muon.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/support/status_matchers.h"
#include "tests/worker/task/optim/peer.h"

namespace refinery::optim {
namespace {

using ::refinery::testing::IsOk;
using ::refinery::testing::MaxDifference;
using ::refinery::testing::StatusIs;
using ::testing::HasSubstr;

at::Tensor SeededMatrix(int64_t rows, int64_t columns, uint64_t seed) {
  return at::randn({rows, columns}, at::detail::createCPUGenerator(seed), at::TensorOptions(at::kFloat));
}

MuonSettings SettingsOf(const nlohmann::json& peer_case) {
  return {.momentum = peer_case["momentum"].get<double>(),
          .nesterov = peer_case["nesterov"].get<bool>(),
          .weight_decay = peer_case["weight_decay"].get<double>(),
          .scale = peer_case["scale"] == "original" ? MuonScale::kOriginal : MuonScale::kMatchRmsAdamW};
}

// Goal: the released optimizer's results. Method: ten steps on four matrices, all settings, stored by torch 2.11.0;
// against its run with the iteration in float32 to rounding, against the released bfloat16 iteration to bfloat16
// accuracy.
TEST(MuonTest, GivesTheReleasedOptimizersParameters) {
  int compared = 0;
  for (const nlohmann::json& peer_case : Peer()["cases"]) {
    if (peer_case["optimizer"] != "muon") continue;
    const double difference = ReplayDifference(peer_case, [&](std::vector<Parameter> parameters) {
      return std::make_unique<Muon>(std::move(parameters), SettingsOf(peer_case));
    });
    // Parameters move by 0.08 to 0.17; torch's own two runs differ by up to 2.8e-3.
    EXPECT_LT(difference, peer_case["iteration"] == "float32" ? 2e-6 : 4e-3) << peer_case.dump().substr(0, 150);
    ++compared;
  }
  EXPECT_EQ(compared, 8);
}

// Goal: the update is near-orthogonal with the right singular vectors. Method: SVD in float64 as oracle, 20 seeded
// matrices, wide and tall; the band of Muon's description.
TEST(MuonTest, UpdateKeepsSingularVectorsAndBandsSingularValues) {
  for (uint64_t seed = 0; seed < 20; ++seed) {
    const at::Tensor matrix = seed % 2 == 0 ? SeededMatrix(16, 96, seed) : SeededMatrix(96, 16, seed);
    const at::Tensor update = NewtonSchulz(matrix, {}).to(at::kDouble);
    const auto [u, s, vh] = at::linalg_svd(matrix.to(at::kDouble), /*full_matrices=*/false);
    const at::Tensor rotated = u.transpose(0, 1).matmul(update).matmul(vh.transpose(0, 1));
    const at::Tensor values = rotated.diagonal();
    EXPECT_GT(values.min().item<double>(), 0.65) << seed;
    EXPECT_LT(values.max().item<double>(), 1.2) << seed;
    EXPECT_LT(MaxDifference(rotated, at::diag(values)), 1e-5) << seed;
  }
}

// Goal: a batch is its matrices, one by one. Method: compare bit patterns up to the rounding of another product order.
TEST(MuonTest, BatchGivesWhatEachMatrixGives) {
  const at::Tensor first = SeededMatrix(8, 20, 1);
  const at::Tensor second = SeededMatrix(8, 20, 2) * 1e-3;
  const at::Tensor batch = NewtonSchulz(at::stack({first, second}), {});
  EXPECT_LT(MaxDifference(batch[0], NewtonSchulz(first, {})), 1e-6);
  EXPECT_LT(MaxDifference(batch[1], NewtonSchulz(second, {})), 1e-6);
}

TEST(MuonTest, ZeroMatrixStaysZero) {
  EXPECT_EQ(NewtonSchulz(at::zeros({4, 6}), {}).abs().max().item<float>(), 0.0f);
}

// Goal: a stored state continues bit for bit. Method: ten steps in one optimizer against 4 + 6 in two.
TEST(MuonTest, StateContinuesBitForBit) {
  const std::vector<Parameter> whole = PeerParameters();
  Muon straight(whole, {});
  Replay(straight, whole, 0.01, 0, 10);

  const std::vector<Parameter> halves = PeerParameters();
  Muon first(halves, {});
  Replay(first, halves, 0.01, 0, 4);
  Muon second(halves, {});
  ASSERT_THAT(second.LoadState(first.State()), IsOk());
  Replay(second, halves, 0.01, 4, 10);
  for (size_t i = 0; i < whole.size(); ++i) EXPECT_TRUE(at::equal(whole[i].value, halves[i].value)) << whole[i].name;
}

TEST(MuonTest, RefusesAForeignState) {
  Muon muon(PeerParameters(), {});
  std::map<std::string, at::Tensor> state = muon.State();
  state.erase("b.momentum");
  EXPECT_THAT(muon.LoadState(state),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("'b.momentum' is missing")));
  state["b.momentum"] = at::zeros({2, 2});
  EXPECT_THAT(muon.LoadState(state), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("wrong shape")));
  state = muon.State();
  state["x.momentum"] = at::zeros({2, 2});
  EXPECT_THAT(muon.LoadState(state), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("unknown entry")));
}

TEST(MuonTest, LeavesParametersWithoutGradientAlone) {
  const std::vector<Parameter> parameters = PeerParameters();
  Muon muon(parameters, {.weight_decay = 0.1});
  SetPeerGradients(parameters, 0);
  parameters[0].value.mutable_grad().reset();
  const at::Tensor before = parameters[0].value.detach().clone();
  const at::Tensor other = parameters[3].value.detach().clone();
  muon.Step(0.1);
  EXPECT_TRUE(at::equal(parameters[0].value, before));
  EXPECT_FALSE(at::equal(parameters[3].value, other));
}

TEST(MuonTest, RefusesVectors) {
  EXPECT_THROW(Muon({{"bias", at::zeros({3})}}, {}), c10::Error);
}

}  // namespace
}  // namespace refinery::optim
