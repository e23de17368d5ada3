// Who may call what, how often, and what is written down of it.

#include <gmock/gmock.h>
#include <google/protobuf/descriptor.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <nlohmann/json.hpp>
#include <set>

#include "common/config_file.h"
#include "common/digest.h"
#include "common/error_details.h"
#include "common/files.h"
#include "common/grpc_status.h"
#include "common/logging.h"
#include "common/principals.h"
#include "refinery/v1/admin_service.pb.h"
#include "refinery/v1/artifact_service.pb.h"
#include "refinery/v1/job_service.pb.h"
#include "refinery/v1/worker_service.pb.h"
#include "server/security/audit_log.h"
#include "server/security/limiter.h"
#include "server/security/methods.h"
#include "tests/server/store/temp_folder.h"
#include "tests/support/certificates.h"
#include "tests/support/status_matchers.h"

namespace refinery::security {
namespace {

using refinery::testing::IsOk;
using refinery::testing::StatusCodeIs;
using refinery::testing::StatusIs;
using refinery::testing::TempFolder;
using ::testing::HasSubstr;

// Goal: no method can be added without saying who may call it.  Method: the protocol's own descriptors are the list.
TEST(MethodsTest, EveryMethodOfTheProtocolHasRoles) {
  std::set<std::string> known;
  for (const Method& method : Methods()) {
    EXPECT_TRUE(known.insert(std::string(method.name)).second) << method.name << " stands twice";
    EXPECT_NE(method.roles & static_cast<int>(Role::kAdmin), 0) << method.name;
  }
  std::set<std::string> declared;
  for (const google::protobuf::FileDescriptor* file :
       {v1::Job::descriptor()->file(), v1::SynchronizeRequest::descriptor()->file(), v1::WriteBlobRequest::descriptor()->file(),
        v1::Tenant::descriptor()->file()}) {
    ASSERT_GT(file->service_count(), 0);
    for (int s = 0; s < file->service_count(); ++s) {
      for (int m = 0; m < file->service(s)->method_count(); ++m) {
        declared.insert(Join("/", file->service(s)->full_name(), "/", file->service(s)->method(m)->name()));
      }
    }
  }
  EXPECT_EQ(known, declared);
  EXPECT_EQ(FindMethod("/refinery.v1.JobService/Nothing"), nullptr);
}

// Goal: what a role may do follows from its name: viewers change nothing, submitters do not administer, workers do not submit.
TEST(MethodsTest, RolesMayDoWhatTheirNamesSay) {
  for (const Method& method : Methods()) {
    const std::string name(method.name);
    const bool viewer = method.roles & static_cast<int>(Role::kViewer), submitter = method.roles & static_cast<int>(Role::kSubmitter),
               worker = method.roles & static_cast<int>(Role::kWorker);
    const bool of_workers = name.find("WorkerService") != std::string::npos, of_admins = name.find("AdminService") != std::string::npos;
    EXPECT_FALSE(method.audited && (viewer || worker)) << name;
    EXPECT_TRUE(submitter || !viewer) << name;
    EXPECT_TRUE(!of_workers || (worker && !submitter)) << name;
    EXPECT_FALSE(of_admins && method.audited && submitter) << name;
  }
}

// Goal: a rate of r lets 2r calls through at once and r a second afterwards, for each caller by itself.  Method: counting under a
// clock of one's own.
TEST(LimiterTest, AdmitsTheRate) {
  Limiter limiter({.rate_per_second = 10});
  Limiter::Clock::time_point now{};
  int admitted = 0;
  for (int i = 0; i < 100; ++i) admitted += limiter.Begin("ann", now).ok();
  EXPECT_EQ(admitted, 20);
  EXPECT_THAT(limiter.Begin("bob", now), IsOk());
  const Status refused = limiter.Begin("ann", now);
  EXPECT_THAT(refused, StatusCodeIs(absl::StatusCode::kResourceExhausted));
  EXPECT_EQ(ReasonOf(refused), "RATE_LIMITED");
  EXPECT_EQ(RetryAfterOf(refused), std::chrono::milliseconds(100));
  for (int i = 0; i < 300; ++i) {  // 3 s in steps of 10 ms
    now += std::chrono::milliseconds(10);
    admitted += limiter.Begin("ann", now).ok();
  }
  EXPECT_EQ(admitted, 50);
}

TEST(LimiterTest, CountsRunningCalls) {
  Limiter limiter({.concurrent_calls = 2});
  const Limiter::Clock::time_point now{};
  EXPECT_THAT(limiter.Begin("ann", now), IsOk());
  EXPECT_THAT(limiter.Begin("ann", now), IsOk());
  EXPECT_EQ(ReasonOf(limiter.Begin("ann", now)), "TOO_MANY_CALLS");
  limiter.End("ann");
  EXPECT_THAT(limiter.Begin("ann", now), IsOk());
}

TEST(AuditLogTest, WritesJsonLinesForItsOwnerAndRotates) {
  TempFolder folder;
  const auto path = folder.path() / "audit.jsonl";
  auto log = AuditLog::Open(path, 2000);
  ASSERT_THAT(log, IsOk());
  for (int i = 0; i < 20; ++i) (*log)->Write({.principal = "ann\xff\"", .method = "JobService/CreateJob", .outcome = "OK"});
  EXPECT_TRUE(std::filesystem::exists(path.string() + ".1"));
  const std::string text = ReadFile(path).value();
  EXPECT_LE(text.size(), 2000);
  EXPECT_EQ(nlohmann::json::parse(text.substr(0, text.find('\n')))["method"], "JobService/CreateJob");
  struct stat info {};
  ASSERT_EQ(stat(path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
}

TEST(PrincipalsTest, FileIsCheckedAndHoldsNoToken) {
  TempFolder folder;
  const auto path = folder.path() / "principals.yaml";
  EXPECT_EQ(ReadPrincipals(path)->principals_size(), 0);  // not there yet
  std::set<std::string> tokens;
  v1::PrincipalFile file;
  for (const char* name : {"ann", "bob"}) {
    const std::string token = NewToken().value();
    EXPECT_EQ(token.size(), 46u);
    EXPECT_TRUE(tokens.insert(token).second);
    v1::Principal* principal = file.add_principals();
    principal->set_name(name);
    principal->set_role("submitter");
    principal->set_tenant("physics");
    principal->set_token_digest(DigestOf(token));
  }
  ASSERT_THAT(WritePrincipals(path, file), IsOk());
  EXPECT_EQ(ReadPrincipals(path)->SerializeAsString(), file.SerializeAsString());
  for (const std::string& token : tokens) EXPECT_EQ(ReadFile(path)->find(token), std::string::npos);
  struct stat info {};
  ASSERT_EQ(stat(path.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);

  const auto broken = [&](auto change, const char* complaint) {
    v1::PrincipalFile copy = file;
    change(copy.mutable_principals(1));
    EXPECT_THAT(WritePrincipals(path, copy), IsOk());
    EXPECT_THAT(ReadPrincipals(path), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(complaint)));
  };
  broken([](v1::Principal* p) { p->set_name("ann"); }, "stands twice");
  broken([](v1::Principal* p) { p->set_role("king"); }, "king");
  broken([](v1::Principal* p) { p->clear_tenant(); }, "needs a tenant");
  broken([](v1::Principal* p) { p->clear_token_digest(); }, "neither");
  broken([](v1::Principal* p) { p->set_token_digest("rf_abc"); }, "token_digest");
  broken([](v1::Principal* p) { p->set_role("admin"); }, "all tenants");
}

// Goal: details are what other gRPC clients expect.  Method: the bytes of google.rpc.Status, ErrorInfo and BadRequest, encoded by hand
// from their field numbers.
TEST(ErrorDetailsTest, TravelAsGoogleRpcMessages) {
  const auto field = [](int number, const std::string& bytes) {
    return Join(std::string(1, static_cast<char>(number << 3 | 2)), std::string(1, static_cast<char>(bytes.size())), bytes);
  };
  const Status status = WithField(InvalidArgument("x is bad"), "x");
  const grpc::Status wire = ToGrpc(status);
  EXPECT_EQ(wire.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  const std::string bad = field(1, field(1, "x") + field(2, "x is bad"));
  EXPECT_THAT(wire.error_details(), HasSubstr(field(3, field(1, "type.googleapis.com/google.rpc.BadRequest") + field(2, bad))));
  const std::string info = field(1, "INVALID_ARGUMENT") + field(2, "refinery");
  EXPECT_THAT(wire.error_details(), HasSubstr(field(3, field(1, "type.googleapis.com/google.rpc.ErrorInfo") + field(2, info))));
  EXPECT_EQ(wire.error_details().substr(0, 2), std::string("\x08\x03"));  // code = INVALID_ARGUMENT

  const Status back = FromGrpc(wire);
  EXPECT_EQ(FieldOf(back), "x");
  EXPECT_EQ(ReasonOf(back), "INVALID_ARGUMENT");
  EXPECT_EQ(ReasonOf(FromGrpc(ToGrpc(Aborted("STALE_LEASE: epoch 3")))), "STALE_LEASE");
  EXPECT_EQ(RetryAfterOf(FromGrpc(ToGrpc(WithRetryAfter(Unavailable("later"), std::chrono::milliseconds(1500))))),
            std::chrono::milliseconds(1500));
  EXPECT_EQ(ResourceOf(FromGrpc(ToGrpc(WithResource(NotFound("no"), "job", "j")))), "job/j");
  EXPECT_EQ(FromGrpc(grpc::Status(grpc::StatusCode::ABORTED, "m", "\xff\xff garbage")).code(), absl::StatusCode::kAborted);
  // However long the parts are, the trailer stays under what clients accept.
  const grpc::Status big = ToGrpc(WithResource(WithField(InvalidArgument(std::string(20'000, 'x')), std::string(5'000, 'f')), "job", ""));
  EXPECT_LT(big.error_message().size() + big.error_details().size() * 4 / 3, 8000u);
}

TEST(ConfigFileTest, FileLiesOverDefaultsAndNamesWhatIsWrong) {
  TempFolder folder;
  const auto path = (folder.path() / "c.yaml").string();
  v1::CoordinatorConfig config;
  config.set_listen("127.0.0.1:1");
  config.set_rate_per_second(200);
  config.set_log_level("info");
  ASSERT_THAT(WriteFileAtomically(path, "listen: 127.0.0.1:2\nrate_per_second: 0\ntls: {key: k.pem}\n"), IsOk());
  ASSERT_THAT(LoadConfig(path, &config), IsOk());
  EXPECT_EQ(config.listen(), "127.0.0.1:2");
  EXPECT_EQ(config.rate_per_second(), 0u);  // said in so many words
  EXPECT_EQ(config.log_level(), "info");    // not said
  EXPECT_EQ(config.tls().key(), "k.pem");
  ASSERT_THAT(WriteFileAtomically(path, ConfigText(config, "refineryd")), IsOk());
  v1::CoordinatorConfig again;
  ASSERT_THAT(LoadConfig(path, &again), IsOk());
  EXPECT_EQ(again.SerializeAsString(), config.SerializeAsString());
  ASSERT_THAT(WriteFileAtomically(path, "listen: x\nlogg_level: info\n"), IsOk());
  EXPECT_THAT(LoadConfig(path, &config), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("c.yaml:2")));
  EXPECT_THAT(LoadConfig(path + "x", &config), StatusCodeIs(absl::StatusCode::kNotFound));
  const char* both[] = {"refineryd", "--config", "a", "--config=b"};
  EXPECT_EQ(ConfigPath(4, both, "REFINERY_NOT_SET"), "b");
}

TEST(LoggingTest, JsonLineHoldsTheFields) {
  const auto line = nlohmann::json::parse(JsonLogLine("t", "info", "refineryd", "event=x job=j-1 reason=\"two words\" a==b \"q\"=1"));
  EXPECT_EQ(line["event"], "x");
  EXPECT_EQ(line["job"], "j-1");
  EXPECT_EQ(line["reason"], "two words");
  EXPECT_EQ(line["message"], "event=x job=j-1 reason=\"two words\" a==b \"q\"=1");
  const std::string odd = JsonLogLine("t", "l", "p", "bad \xff bytes = = =x message=no\n");
  EXPECT_FALSE(nlohmann::json::parse(odd, nullptr, false).is_discarded()) << odd;
}

TEST(TlsFilesTest, MistakesAreNamed) {
  TempFolder folder;
  refinery::testing::Certificates authority(folder.path());
  if (!authority.ok()) GTEST_SKIP() << "no openssl program";
  const TlsFiles server = authority.Issue("server"), other = authority.Issue("other");
  EXPECT_THAT(CheckTlsFiles(server), IsOk());
  EXPECT_THAT(CheckTlsFiles({.certificate = server.certificate, .key = other.key}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("does not belong")));
  EXPECT_THAT(CheckTlsFiles({.certificate = server.certificate}), StatusCodeIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(CheckTlsFiles({.certificate = server.key, .key = server.key}),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("server.key")));
  EXPECT_THAT(CheckTlsFiles({.authority = folder.path() / "nothing"}), StatusCodeIs(absl::StatusCode::kNotFound));
  const auto left = TimeToExpiry(server.certificate);
  ASSERT_THAT(left, IsOk());
  EXPECT_GE(left->count(), 23);
  EXPECT_LE(left->count(), 24);
}

}  // namespace
}  // namespace refinery::security
