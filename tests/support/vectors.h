// tests/support/vectors.h
//
// Reads the committed vectors below tests/vectors (JSON made by a peer; the generator lies beside each file) as tensors.

#pragma once

#include <ATen/ATen.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

namespace refinery::testing {

// `name` below tests/vectors. Throws where the file is missing or not JSON: a broken checkout, not a test result.
inline nlohmann::json ReadVectors(const std::string& name) {
  std::ifstream file(std::string(REFINERY_SOURCE_DIR) + "/tests/vectors/" + name);
  return nlohmann::json::parse(file);
}

// A flat JSON list of numbers as a float64 tensor.
inline at::Tensor TensorOf(const nlohmann::json& values, at::IntArrayRef shape) {
  return at::tensor(values.get<std::vector<double>>(), at::kDouble).reshape(shape);
}

// The largest |a - b|, in float64.
inline double MaxDifference(const at::Tensor& a, const at::Tensor& b) {
  if (a.numel() == 0) return 0;
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

}  // namespace refinery::testing
