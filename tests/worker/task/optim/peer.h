// tests/worker/task/optim/peer.h
//
// The runs of torch.optim in tests/vectors/optim/optim.json, to be replayed by our optimizers.

#pragma once

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "tests/support/vectors.h"
#include "worker/task/optim/optimizer.h"

namespace refinery::optim {

inline const nlohmann::json& Peer() {
  static const nlohmann::json vectors = testing::ReadVectors("optim/optim.json");
  return vectors;
}

inline std::vector<int64_t> PeerShape(const std::string& name) {
  return Peer()["shapes"][name].get<std::vector<int64_t>>();
}

inline std::vector<Parameter> PeerParameters() {
  std::vector<Parameter> parameters;
  for (const auto& [name, values] : Peer()["start"].items()) {
    parameters.push_back({name, testing::TensorOf(values, PeerShape(name)).to(at::kFloat).requires_grad_(true)});
  }
  return parameters;
}

inline void SetPeerGradients(const std::vector<Parameter>& parameters, size_t step) {
  for (const Parameter& parameter : parameters) {
    const nlohmann::json& values = Peer()["gradients"][parameter.name][step];
    parameter.value.mutable_grad() = testing::TensorOf(values, PeerShape(parameter.name)).to(at::kFloat);
  }
}

using OptimizerFactory = std::function<std::unique_ptr<Optimizer>(std::vector<Parameter>)>;

// Replays steps [begin, end) of the run.
inline void Replay(Optimizer& optimizer, const std::vector<Parameter>& parameters, double learning_rate, size_t begin,
                   size_t end) {
  for (size_t step = begin; step < end; ++step) {
    SetPeerGradients(parameters, step);
    optimizer.Step(learning_rate);
  }
}

// The largest difference to the peer's parameters after its ten steps.
inline double ReplayDifference(const nlohmann::json& peer_case, const OptimizerFactory& make) {
  const std::vector<Parameter> parameters = PeerParameters();
  const std::unique_ptr<Optimizer> optimizer = make(parameters);
  Replay(*optimizer, parameters, peer_case["lr"].get<double>(), 0, 10);
  double largest = 0;
  for (const Parameter& parameter : parameters) {
    const at::Tensor wanted = testing::TensorOf(peer_case["final"][parameter.name], PeerShape(parameter.name));
    largest = std::max(largest, testing::MaxDifference(parameter.value.detach(), wanted));
  }
  return largest;
}

}  // namespace refinery::optim
