// Goal: sizes and manners of the source that no compiler checks (docs/adr, CONTRIBUTING).  Method: read the tree.

#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>

#include "common/files.h"

namespace refinery {
namespace {

namespace fs = std::filesystem;
const fs::path kRoot = REFINERY_SOURCE_DIR;

struct Limit {
  const char* extension;
  long lines;
};

std::vector<fs::path> Sources(std::initializer_list<const char*> folders) {
  std::vector<fs::path> files;
  for (const char* folder : folders)
    for (const auto& entry : fs::recursive_directory_iterator(kRoot / folder))
      if (entry.path().extension() == ".cc" || entry.path().extension() == ".h") files.push_back(entry.path());
  return files;
}

TEST(SourceTest, FilesStaySmallEnoughToRead) {
  for (const fs::path& path : Sources({"common", "server", "client", "worker", "tests"})) {
    std::string text = ReadFile(path).value();
    long lines = std::count(text.begin(), text.end(), '\n');
    EXPECT_LE(lines, path.extension() == ".h" ? 250 : 600) << path;
  }
}

TEST(SourceTest, HeadersSayWhatTheyAre) {
  for (const fs::path& path : Sources({"common", "server", "client", "worker"})) {
    if (path.extension() != ".h") continue;
    std::string text = ReadFile(path).value();
    EXPECT_TRUE(text.starts_with("// " + fs::relative(path, kRoot).generic_string() + "\n")) << path;
    EXPECT_NE(text.find("#pragma once"), std::string::npos) << path;
  }
}

TEST(SourceTest, NoLeftovers) {
  std::vector<std::string> words = {std::string("FIX") + "ME", std::string("TO") + "DO", std::string("do not ") + "commit"};
  for (const fs::path& path : Sources({"common", "server", "client", "worker", "tests"})) {
    std::string text = ReadFile(path).value();
    for (const std::string& word : words) EXPECT_EQ(text.find(word), std::string::npos) << path << ": " << word;
  }
}

}  // namespace
}  // namespace refinery
