// Goal: the dependency direction of docs/architecture.md holds.  Method: read every #include of the tree and compare the two
// folders with tests/tidy/layers.txt; no file sees both LibTorch and protobuf.

#include <gtest/gtest.h>

#include <filesystem>
#include <map>
#include <regex>
#include <set>
#include <sstream>

#include "common/files.h"

namespace refinery {
namespace {

namespace fs = std::filesystem;
const fs::path kRoot = REFINERY_SOURCE_DIR;

std::map<std::string, std::set<std::string>> ReadLayers() {
  std::map<std::string, std::set<std::string>> layers;
  std::istringstream file(ReadFile(kRoot / "tests/tidy/layers.txt").value());
  std::string line;
  while (std::getline(file, line)) {
    if (line.empty() || line[0] == '#') continue;
    size_t colon = line.find(':');
    std::istringstream words(line.substr(colon + 1));
    std::set<std::string>& allowed = layers[line.substr(0, colon)];
    std::string word;
    while (words >> word) allowed.insert(word);
  }
  return layers;
}

// The layer an include belongs to; empty for the standard library and third parties.
std::string LayerOf(const std::string& include) {
  if (include.starts_with("refinery/v1/")) return "proto";
  if (include.starts_with("ATen/") || include.starts_with("torch/") || include.starts_with("c10/")) return "torch";
  for (const char* top : {"common/", "server/", "client/", "worker/", "tests/"})
    if (include.starts_with(top)) return fs::path(include).parent_path().generic_string();
  return "";
}

TEST(LayersTest, EveryIncludePointsTheRightWay) {
  auto layers = ReadLayers();
  std::regex pattern(R"re(^\s*#include\s*[<"]([^>"]+)[>"])re");
  int files = 0;
  for (const char* top : {"common", "server", "client", "worker"}) {
    for (const auto& entry : fs::recursive_directory_iterator(kRoot / top)) {
      std::string extension = entry.path().extension();
      if (extension != ".cc" && extension != ".h") continue;
      ++files;
      std::string folder = fs::relative(entry.path().parent_path(), kRoot).generic_string();
      SCOPED_TRACE(entry.path());
      ASSERT_TRUE(layers.count(folder)) << folder << " is not in tests/tidy/layers.txt";
      std::istringstream lines(ReadFile(entry.path()).value());
      std::string line;
      bool torch = false, proto = false;
      while (std::getline(lines, line)) {
        std::smatch match;
        if (!std::regex_search(line, match, pattern)) continue;
        std::string layer = LayerOf(match[1]);
        torch |= layer == "torch" || match[1] == "worker/task/runtime/torch.h";
        proto |= layer == "proto";
        if (layer.empty() || layer == folder || layer == "common") continue;
        EXPECT_TRUE(layers[folder].count(layer)) << folder << " must not include " << match[1];
      }
      EXPECT_FALSE(torch && proto) << "LibTorch's and protobuf's headers must not meet in one file";
    }
  }
  EXPECT_GT(files, 10);
}

}  // namespace
}  // namespace refinery
