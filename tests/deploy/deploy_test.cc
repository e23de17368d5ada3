// Goal: what stands under deploy/ can be read by the programs it is for.  Method: parse every file with the format's own
// parser, and check the cross references that a parser does not see.

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <yaml-cpp/yaml.h>

#include <filesystem>
#include <nlohmann/json.hpp>
#include <set>

#include "common/files.h"

namespace refinery {
namespace {

namespace fs = std::filesystem;
const fs::path kRoot = REFINERY_SOURCE_DIR;

std::string Read(const fs::path& path) {
  auto text = ReadFile(path);
  EXPECT_TRUE(text.ok()) << path;
  return text.value_or("");
}

int RunShell(const std::string& command) { return std::system(command.c_str()); }

TEST(DeployTest, EveryFileParses) {
  std::set<std::string> known = {".yaml", ".yml", ".json", ".sh", ".txt", ".service", ".conf", ""};
  int parsed = 0;
  for (const auto& entry : fs::recursive_directory_iterator(kRoot / "deploy")) {
    if (!entry.is_regular_file()) continue;
    std::string extension = entry.path().extension();
    SCOPED_TRACE(entry.path());
    ASSERT_TRUE(known.count(extension)) << "teach this test the format " << extension;
    if (extension == ".yaml" || extension == ".yml") {
      EXPECT_NO_THROW(YAML::LoadAllFromFile(entry.path()));
    } else if (extension == ".json") {
      EXPECT_FALSE(nlohmann::json::parse(Read(entry.path()), nullptr, false).is_discarded());
    } else if (extension == ".sh") {
      EXPECT_EQ(RunShell("bash -n " + entry.path().string()), 0);
    }
    ++parsed;
  }
  EXPECT_GE(parsed, 6);
}

TEST(DeployTest, ComposeFileHoldsTogether) {
  YAML::Node compose = YAML::LoadFile(kRoot / "docker-compose.yml");
  std::set<std::string> volumes;
  for (const auto& volume : compose["volumes"]) volumes.insert(volume.first.as<std::string>());
  std::string dockerfile = Read(kRoot / "deploy/docker/Dockerfile");
  for (const char* name : {"coordinator", "worker-1", "worker-2", "prometheus"})
    EXPECT_TRUE(compose["services"][name]) << name;
  for (const auto& service : compose["services"]) {
    SCOPED_TRACE(service.first.as<std::string>());
    if (YAML::Node build = service.second["build"]) {
      EXPECT_TRUE(fs::exists(kRoot / build["dockerfile"].as<std::string>()));
      EXPECT_THAT(dockerfile, ::testing::HasSubstr(" AS " + build["target"].as<std::string>() + "\n"));
    }
    for (const auto& mount : service.second["volumes"]) {
      std::string source = mount.as<std::string>();
      source = source.substr(0, source.find(':'));
      if (source.starts_with("./")) {
        EXPECT_TRUE(fs::exists(kRoot / source)) << source;
      } else if (source.front() != '/') {
        EXPECT_TRUE(volumes.count(source)) << source;
      }
    }
  }
}

TEST(DeployTest, PrometheusScrapesTheServicesOfCompose) {
  YAML::Node compose = YAML::LoadFile(kRoot / "docker-compose.yml");
  YAML::Node prometheus = YAML::LoadFile(kRoot / "deploy/prometheus/prometheus.yml");
  int targets = 0;
  for (const auto& job : prometheus["scrape_configs"]) {
    for (const auto& config : job["static_configs"]) {
      for (const auto& target : config["targets"]) {
        std::string host = target.as<std::string>();
        host = host.substr(0, host.find(':'));
        EXPECT_TRUE(compose["services"][host]) << host;
        ++targets;
      }
    }
  }
  EXPECT_EQ(targets, 3);
}

// The images must install what a developer's machine installs: both call the same script.
TEST(DeployTest, ImagesUseTheInstallScript) {
  EXPECT_THAT(Read(kRoot / "deploy/docker/Dockerfile"), ::testing::HasSubstr("deploy/install_dependencies.sh"));
  EXPECT_THAT(Read(kRoot / "Makefile"), ::testing::HasSubstr("deploy/install_dependencies.sh"));
}

}  // namespace
}  // namespace refinery
