// tests/worker/task/checkpoint/folder_fixture.h
//
// A temporary folder per test, and deterministic damage to files.

#pragma once

#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdint>
#include <filesystem>
#include <fstream>
#include <string>

#include "common/files.h"

namespace refinery::checkpoint {

class FolderTest : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto* info = ::testing::UnitTest::GetInstance()->current_test_info();
    folder_ = std::filesystem::temp_directory_path() /
              Join("refinery_checkpoint_test.", static_cast<int64_t>(::getpid()), ".", info->name());
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  std::filesystem::path Write(const std::string& name, const std::string& bytes) {
    std::filesystem::create_directories((folder_ / name).parent_path());
    std::ofstream(folder_ / name, std::ios::binary) << bytes;
    return folder_ / name;
  }

  std::filesystem::path folder_;
};

// A small deterministic generator (PCG's multiplier); only for choosing what to damage.
class Dice {
 public:
  explicit Dice(uint64_t seed) : state_(seed) {}
  uint64_t Below(uint64_t bound) {
    state_ = state_ * 6364136223846793005ULL + 1442695040888963407ULL;
    return (state_ >> 24) % bound;
  }

 private:
  uint64_t state_;
};

// The first `prefixes` rounds cut the file at that many evenly spread lengths; later ones change one to four bytes,
// mostly near the start where headers stand.
inline std::string Damage(const std::string& original, int round, int prefixes) {
  if (round < prefixes)
    return original.substr(0, original.size() * static_cast<size_t>(round) / static_cast<size_t>(prefixes));
  Dice dice(static_cast<uint64_t>(round) * 7919);
  std::string damaged = original;
  uint64_t reach = dice.Below(2) == 0 ? original.size() : std::min<uint64_t>(original.size(), 600);
  for (uint64_t k = dice.Below(4) + 1; k > 0; --k) {
    char& byte = damaged[dice.Below(reach)];
    byte = dice.Below(2) == 0 ? static_cast<char>(dice.Below(256)) : static_cast<char>(byte ^ (1 << dice.Below(8)));
  }
  return damaged;
}

}  // namespace refinery::checkpoint
