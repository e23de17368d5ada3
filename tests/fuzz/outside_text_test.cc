// Text and bytes from people and other programs: recipes, configuration files, principals, manifests, filters' page tokens, the names of
// jobs, error details, what a task program prints. Each mutation is refused in words or read; where a canonical form exists, what was
// read is written back and compared.

#include <gmock/gmock.h>
#include <google/protobuf/util/message_differencer.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <fstream>
#include <set>

#include "absl/strings/escaping.h"
#include "common/config_file.h"
#include "common/digest.h"
#include "common/error_details.h"
#include "common/files.h"
#include "common/grpc_status.h"
#include "common/principals.h"
#include "common/recipe.h"
#include "refinery/v1/config.pb.h"
#include "server/api/list.h"
#include "server/api/visible.h"
#include "tests/fuzz/mutator.h"
#include "tests/server/jobs/tiny_job.h"
#include "tests/server/store/temp_folder.h"
#include "tests/support/status_matchers.h"
#include "worker/agent/task_process.h"

namespace refinery {
namespace {

using fuzz::Mutator;
using google::protobuf::util::MessageDifferencer;
using refinery::testing::CoreDriver;
using refinery::testing::IsOk;
using refinery::testing::StatusCodeIs;
using refinery::testing::TempFolder;

const std::vector<std::string>& YamlWords() {
  static const auto& words = *new std::vector<std::string>{
      "&a ", "*a", "<<: *a", "? ", "- ", ": ", "!!binary ", "|\n", ">-\n", "---\n", "...\n", "%YAML 9.9\n", "\t", "{}", "[]", "~", "null",
      ".inf", ".nan", "0x7f", "1e999", "-1", "18446744073709551616", "9223372036854775808", "true", "'", "\"\\uD800\"", "\"\\x00\"", "#",
      "trials: 4000000000", "seed: 1", "student: {model: x}"};
  return words;
}

template <typename T>
void ReadsBack(const T& message) {
  T again;
  YamlPlaces places;
  const std::string yaml = MessageToYaml(message);
  ASSERT_THAT(YamlToMessage(yaml, "again.yaml", &again, &places), IsOk()) << yaml;
  EXPECT_TRUE(MessageDifferencer::Equals(message, again)) << yaml;
}

TEST(OutsideTextTest, RecipesAreReadOrRefusedInWords) {
  const std::string good = *ReadFile(std::filesystem::path(REFINERY_SOURCE_DIR) / "deploy/recipes/demo.yaml");
  int accepted = 0, raw = 0;
  for (uint32_t seed = 1; seed <= 3'000 && !HasFailure(); ++seed) {
    const std::string text = seed == 1 ? good : Mutator(seed).Bytes(good, YamlWords());
    SCOPED_TRACE(Join("seed ", seed));
    v1::Recipe plain;
    YamlPlaces places;
    if (YamlToMessage(text, "r.yaml", &plain, &places).ok()) {
      ++raw;
      ReadsBack(plain);
    }
    const StatusOr<v1::Recipe> recipe = ParseRecipe(text, "r.yaml", "/data");
    if (recipe.ok()) {
      ++accepted;
      ReadsBack(*recipe);
    } else {
      EXPECT_THAT(recipe, StatusCodeIs(absl::StatusCode::kInvalidArgument)) << recipe.status();
      EXPECT_NE(Message(recipe.status()).find("r.yaml"), std::string::npos) << recipe.status();
    }
  }
  EXPECT_GT(accepted, 100);
  EXPECT_GT(raw, accepted);
}

// Much from little: a document that yaml-cpp 0.7 finds again and again, deep nesting, and aliases of aliases, which grow by ten at each line.
TEST(OutsideTextTest, YamlThatExplodesIsRefused) {
  std::string aliases = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n";
  for (int i = 1; i < 12; ++i) {
    aliases += Join("a", i, ": &a", i, " [");
    for (int k = 0; k < 10; ++k) aliases += Join(k > 0 ? ", " : "", "*a", i - 1);
    aliases += "]\n";
  }
  for (const std::string& text : {std::string(","), std::string("a: 1\n---\n, x"), std::string(100'000, '['), std::string(100'000, '{'), "a: " + std::string(50'000, '&'), aliases,
                                  std::string("&a [*a]"), std::string("&a {student: *a}"), std::string(200'000, '-') + " x",
                                  "student: " + std::string(30'000, '{') + std::string(30'000, '}')}) {
    EXPECT_THAT(ParseRecipe(text, "r.yaml", "/data"), StatusCodeIs(absl::StatusCode::kInvalidArgument)) << text.substr(0, 40);
  }
}

// Writes each mutation of `good` to a file and has it read.
template <typename Read>
void ForEachFile(const std::string& good, uint32_t count, const Read& read) {
  TempFolder folder;
  const auto path = folder.path() / "file.yaml";
  for (uint32_t seed = 1; seed <= count && !::testing::Test::HasFailure(); ++seed) {
    SCOPED_TRACE(Join("seed ", seed));
    std::ofstream(path, std::ios::binary | std::ios::trunc) << (seed == 1 ? good : Mutator(seed).Bytes(good, YamlWords()));
    read(path);
  }
}

TEST(OutsideTextTest, ConfigurationsAreReadOrRefusedInWords) {
  v1::CoordinatorConfig coordinator;
  coordinator.set_state("/var/lib/refinery");
  coordinator.set_listen("127.0.0.1:7433");
  coordinator.set_lease_ttl_ms(30'000);
  coordinator.set_rate_per_second(50);
  coordinator.mutable_tls()->set_certificate("c.pem");
  coordinator.set_disk_full_percent(90.5);
  v1::WorkerConfig worker;
  worker.set_slots(2);
  worker.set_drain_grace(10);
  worker.set_token_file("token");
  (*worker.mutable_labels())["zone"] = "a";
  int accepted = 0;
  const auto read = [&](const std::filesystem::path& path, auto config) {
    const Status status = LoadConfig(path.string(), &config);
    if (status.ok()) {
      ++accepted;
      ReadsBack(config);
    } else {
      EXPECT_NE(Message(status).find("file.yaml"), std::string::npos) << status;
    }
  };
  ForEachFile(ConfigText(coordinator, "refineryd"), 1'000, [&](const auto& path) { read(path, v1::CoordinatorConfig()); });
  ForEachFile(ConfigText(worker, "refinery-worker"), 1'000, [&](const auto& path) { read(path, v1::WorkerConfig()); });
  EXPECT_GT(accepted, 200);
}

// A damaged file of principals must never let in whom the good one did not name: names, roles and tokens that are read are ones that
// the text says in full.
TEST(OutsideTextTest, PrincipalsAreReadOrRefusedInWords) {
  v1::PrincipalFile file;
  for (const char* name : {"ann", "bob", "w1"}) {
    v1::Principal* principal = file.add_principals();
    principal->set_name(name);
    principal->set_role(*name == 'w' ? "worker" : "submitter");
    if (*name != 'w') principal->set_tenant("team");
    principal->set_token_digest(DigestOf(name));
  }
  int accepted = 0;
  ForEachFile(MessageToYaml(file), 3'000, [&](const std::filesystem::path& path) {
    const StatusOr<v1::PrincipalFile> read = ReadPrincipals(path);
    if (!read.ok()) {
      EXPECT_NE(Message(read.status()).find("file.yaml"), std::string::npos) << read.status();
      return;
    }
    ++accepted;
    std::set<std::string> names;
    for (const v1::Principal& principal : read->principals()) {
      EXPECT_THAT(CheckName(principal.name(), "name"), IsOk());
      EXPECT_THAT(ParseRole(principal.role()), IsOk());
      EXPECT_TRUE(IsDigest(principal.token_digest()) || !principal.certificate().empty());
      EXPECT_TRUE(names.insert(principal.name()).second);
    }
  });
  EXPECT_GT(accepted, 20);
}

// A manifest has one text: what is read gives the same bytes again.
TEST(OutsideTextTest, ManifestsAreCanonical) {
  const std::string good = ManifestText({{"a/b.json", DigestOf("1"), 1}, {"c", DigestOf("2"), 18'446'744'073'709'551'615u}, {"d e", DigestOf("3"), 0}});
  int accepted = 0;
  for (uint32_t seed = 1; seed <= 5'000; ++seed) {
    const std::string text = Mutator(seed).Bytes(good, {"../", "/", " ", "\n", "sha256:", "-1", "00", "./", "a//b"});
    const auto files = ParseManifest(text);
    if (!files.ok()) continue;
    ++accepted;
    EXPECT_EQ(ManifestText(*files), text) << "seed " << seed;
    for (const FileEntry& entry : *files) {
      for (const auto& part : std::filesystem::path(entry.path)) EXPECT_NE(part, "..") << entry.path;
    }
  }
  EXPECT_GT(accepted, 50);
}

TEST(OutsideTextTest, OnlyOurPageTokensAreTaken) {
  CoreDriver driver;
  for (int i = 0; i < 5; ++i) ASSERT_THAT(driver.Create(Join("job-", i)), IsOk());
  const security::Principal principal{.name = "ann", .role = Role::kAdmin};
  v1::ListJobsRequest request;
  request.set_page_size(2);
  request.set_order_by("priority desc, owner");
  v1::ListJobsResponse first;
  ASSERT_THAT(api::ListJobs(driver.core.state(), principal, request, "key", driver.now, &first), IsOk());
  const std::string good = first.next_page_token();
  ASSERT_FALSE(good.empty());
  std::string raw;
  ASSERT_TRUE(absl::WebSafeBase64Unescape(good, &raw));
  for (uint32_t seed = 1; seed <= 2'000 && !HasFailure(); ++seed) {
    Mutator mutator(seed);
    // The text of the token, or the bytes that it stands for.
    const std::string token = seed % 2 == 0 ? mutator.Bytes(good) : absl::WebSafeBase64Escape(mutator.Bytes(raw));
    std::string means;
    if (token.empty() || (absl::WebSafeBase64Unescape(token, &means) && means == raw)) continue;  // the same token, written otherwise
    request.set_page_token(token);
    v1::ListJobsResponse page;
    EXPECT_THAT(api::ListJobs(driver.core.state(), principal, request, "key", driver.now, &page),
                StatusCodeIs(absl::StatusCode::kInvalidArgument)) << "seed " << seed;
    EXPECT_TRUE(page.jobs().empty());
  }
  // The right token of another key, caller or list is as good as none.
  request.set_page_token(good);
  v1::ListJobsResponse page;
  EXPECT_FALSE(api::ListJobs(driver.core.state(), principal, request, "other key", driver.now, &page).ok());
  EXPECT_FALSE(api::ListJobs(driver.core.state(), {.name = "bob", .role = Role::kAdmin}, request, "key", driver.now, &page).ok());
  EXPECT_THAT(api::ListJobs(driver.core.state(), principal, request, "key", driver.now, &page), IsOk());
  EXPECT_EQ(page.jobs_size(), 2);
}

// No name finds a job of another tenant, and what is found is what was named.
TEST(OutsideTextTest, NamesFindOnlyWhatTheyName) {
  CoreDriver driver;
  for (const char* id : {"alpha-1", "alpha-2", "beta"}) ASSERT_THAT(driver.Create(id), IsOk());
  const security::Principal ours{.name = "ann", .role = Role::kViewer, .tenant = "default"};
  const security::Principal theirs{.name = "eve", .role = Role::kViewer, .tenant = "other"};
  int found = 0;
  for (uint32_t seed = 1; seed <= 3'000; ++seed) {
    const std::string name = Mutator(seed).Bytes("tenants/default/jobs/alpha-1", {"/", "tenants/", "other", "jobs/", "beta", ".."});
    EXPECT_FALSE(api::FindJob(driver.core.state(), theirs, name).ok()) << name;
    const auto job = api::FindJob(driver.core.state(), ours, name);
    if (!job.ok()) continue;
    ++found;
    const size_t slash = name.rfind('/');
    EXPECT_TRUE((*job)->id.starts_with(name.substr(slash == std::string::npos ? 0 : slash + 1))) << name;
  }
  EXPECT_GT(found, 10);
}

// What another server puts into the trailer.
TEST(OutsideTextTest, ErrorDetailsAreReadOrIgnored) {
  const Status full = WithRetryAfter(WithResource(WithField(WithReason(Aborted("x"), "STALE_LEASE", {{"a", "b"}}), "lease"), "job", "j"),
                                     std::chrono::milliseconds(1500));
  const grpc::Status good = ToGrpc(full);
  ASSERT_FALSE(good.error_details().empty());
  for (uint32_t seed = 1; seed <= 3'000; ++seed) {
    Mutator mutator(seed);
    const Status status = FromGrpc(grpc::Status(static_cast<grpc::StatusCode>(mutator.Below(31)), mutator.Bytes("STALE_LEASE: x"),
                                                mutator.Bytes(good.error_details())));
    if (status.ok()) continue;
    (void)ReasonOf(status);
    (void)FieldOf(status);
    (void)ResourceOf(status);
    (void)RetryAfterOf(status);
  }
}

// Every line that a task program prints is an event or a line of its log; none is lost and none ends the agent.
TEST(OutsideTextTest, EveryLineOfATaskIsAnEventOrALogLine) {
  const std::vector<std::string> good = {
      R"({"progress":{"phase":"training","done":1,"total":2,"tokensTrained":"123"}})",
      R"({"measurement":{"name":"validation_loss","value":1.5,"count":"7"}})", R"({"note":{"code":"damping_raised","text":"layer 3"}})",
      R"({"checkpoint":{"name":"step-1","step":"1"}})", R"({"error":{"failureClass":"INFRA","code":14,"message":"ends"}})"};
  std::string text;
  int lines = 0;
  for (uint32_t seed = 1; seed <= 3'000; ++seed) {
    Mutator mutator(seed);
    std::string line = mutator.Bytes(good[seed % good.size()], {"null", "1e999", "NaN", "\"-1\"", "[[[[", "{\"a\":", "\\ud800", "-9223372036854775809"});
    for (char& c : line) c = c == '\n' ? ' ' : c;
    if (line.empty()) continue;
    text += line + "\n";
    ++lines;
  }
  text += "{\"note\":" + std::string(20'000, '[') + "\n" + std::string(3 << 20, 'x') + "\n" + good[0] + "\n";
  lines += 3;
  TempFolder folder;
  std::ofstream(folder.path() / "said", std::ios::binary) << text;
  const auto program = folder.path() / "task";
  std::ofstream(program) << "#!/bin/sh\nexec cat " << (folder.path() / "said").string() << "\n";
  ASSERT_EQ(chmod(program.c_str(), 0755), 0);
  int events = 0, logs = 0;
  bool last = false;
  agent::TaskProcess task;
  const auto ended = task.Run({.program = program}, [&](const v1::TaskEvent& event) {
    ++events;
    last = event.progress().phase() == "training";
  }, [&](std::string_view) { ++logs; });
  ASSERT_THAT(ended, IsOk());
  EXPECT_EQ(ended->code, 0);
  EXPECT_EQ(events + logs, lines);
  EXPECT_GT(events, 200);
  EXPECT_TRUE(last);
}

}  // namespace
}  // namespace refinery
