// The coordinator's door as callers find it: TLS, tokens, roles, tenants, limits and the audit log, over real loopback connections.

#include <gmock/gmock.h>
#include <grpcpp/generic/generic_stub.h>
#include <gtest/gtest.h>

#include <thread>

#include "common/digest.h"
#include "common/error_details.h"
#include "common/principals.h"
#include "server/api/recovery.h"
#include "tests/server/api/fake_worker.h"
#include "tests/server/api/test_server.h"
#include "tests/support/certificates.h"
#include "tests/support/status_matchers.h"

namespace refinery::api {
namespace {

using refinery::testing::Caller;
using refinery::testing::Certificates;
using refinery::testing::FakeWorker;
using refinery::testing::IsOk;
using refinery::testing::StatusCodeIs;
using refinery::testing::StatusIs;
using refinery::testing::TempFolder;
using refinery::testing::TestServer;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr absl::StatusCode kUnauthenticated = absl::StatusCode::kUnauthenticated;
constexpr absl::StatusCode kDenied = absl::StatusCode::kPermissionDenied;
constexpr std::chrono::seconds kReload{1};

class GuardedServerTest : public ::testing::Test {
 protected:
  // A principal with a token in a file of his name.
  void Add(const std::string& name, const std::string& role, const std::string& tenant = "", const std::string& certificate = "") {
    v1::PrincipalFile file = *ReadPrincipals(principals());
    v1::Principal* principal = file.add_principals();
    principal->set_name(name);
    principal->set_role(role);
    principal->set_tenant(tenant);
    principal->set_certificate(certificate);
    tokens_[name] = *NewToken();
    principal->set_token_digest(DigestOf(tokens_[name]));
    ASSERT_THAT(WritePrincipals(principals(), file), IsOk());
    ASSERT_THAT(WriteFileAtomically(folder_.path() / name, tokens_[name] + "\n"), IsOk());
  }
  void Start(ServerOptions options = {}) {
    options.gate.principals = principals();
    options.gate.audit_log = folder_.path() / "audit.jsonl";
    options.gate.reload = std::chrono::milliseconds(0);
    ASSERT_THAT(server_.Start(options), IsOk());
  }
  ChannelSecurity TokenOf(const std::string& name) const { return {.token_file = folder_.path() / name, .reload = kReload}; }
  Caller As(const std::string& name) { return Caller(*MakeChannel(server_.address(), TokenOf(name))); }
  std::filesystem::path principals() const { return folder_.path() / "principals.yaml"; }

  TempFolder folder_;
  std::map<std::string, std::string> tokens_;
  TestServer server_;
};

// Goal: each role may do what the table says, over the wire, for a call of each kind: unary, stream, blob, worker, admin.
TEST_F(GuardedServerTest, RolesDecide) {
  Add("root", "admin");
  Add("ann", "submitter", "default");
  Add("eve", "viewer", "default");
  Add("gpu", "worker");
  Start();
  Caller nobody(MakeChannel(server_.address()));
  EXPECT_EQ(ReasonOf(nobody.List().status()), "NO_TOKEN");
  EXPECT_THAT(nobody.Version(), StatusCodeIs(kUnauthenticated));
  EXPECT_EQ(As("ann").Version()->caller(), "ann");
  EXPECT_EQ(As("eve").Version()->role(), "viewer");

  const auto job = As("ann").Create();
  ASSERT_THAT(job, IsOk());
  EXPECT_EQ(job->owner(), "ann");
  v1::ChangeJobRequest change;
  change.set_id(job->id());
  EXPECT_THAT(As("eve").Change(&v1::JobService::Stub::PauseJob, change), StatusCodeIs(kDenied));
  EXPECT_THAT(As("eve").Get(job->id()), IsOk());
  EXPECT_THAT(As("eve").Create(), StatusCodeIs(kDenied));
  EXPECT_THAT(As("gpu").List(), StatusCodeIs(kDenied));
  EXPECT_THAT(FakeWorker(As("gpu").channel(), "w").Next(), IsOk());
  EXPECT_THAT(FakeWorker(As("ann").channel(), "w").Next(), StatusCodeIs(kDenied));

  Caller root = As("root"), ann = As("ann");
  const v1::GetCoordinatorRequest ask;
  EXPECT_TRUE(root.Call(root.admin(), &v1::AdminService::Stub::GetCoordinator, ask)->authenticated());
  v1::DrainCoordinatorRequest drain;
  drain.set_drain(true);
  EXPECT_THAT(ann.Call(ann.admin(), &v1::AdminService::Stub::DrainCoordinator, drain), StatusCodeIs(kDenied));
  const auto drained = root.Call(root.admin(), &v1::AdminService::Stub::DrainCoordinator, drain);
  ASSERT_THAT(drained, IsOk());
  EXPECT_EQ(drained->state(), "draining");
  EXPECT_EQ(FakeWorker(As("gpu").channel(), "w").Next()->token().path(), "");

  grpc::ClientContext context;
  v1::WatchJobRequest watch;
  watch.set_id(job->id());
  v1::WatchJobResponse response;
  const auto stream = nobody.jobs().WatchJob(&context, watch);
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_THAT(FromGrpc(stream->Finish()), StatusCodeIs(kUnauthenticated));
}

// Goal: a tenant cannot see, name, change, watch, list or count the jobs of another, nor tell them from jobs that are not there.
TEST_F(GuardedServerTest, TenantsAreIsolated) {
  Add("root", "admin");
  Add("ann", "submitter", "physics");
  Add("bob", "submitter", "biology");
  Start();
  v1::CreateJobRequest named;
  named.set_job_id("secret-work");
  named.set_request_id("r1");
  const auto job = As("ann").Create(named);
  ASSERT_THAT(job, IsOk());
  EXPECT_EQ(job->name(), "tenants/physics/jobs/secret-work");
  Caller bob = As("bob");
  for (const char* name : {"secret-work", "secret", "tenants/physics/jobs/secret-work", "tenants/biology/jobs/secret-work"}) {
    const Status missing = bob.Get(name).status();
    EXPECT_THAT(missing, StatusCodeIs(absl::StatusCode::kNotFound));
    EXPECT_EQ(Message(missing), Message(bob.Get("zzz").status()).replace(16, 3, name));  // "there is no job zzz; ..."
    v1::ChangeJobRequest change;
    change.set_id(name);
    for (const Caller::Verb verb : {&v1::JobService::Stub::KillJob, &v1::JobService::Stub::RetryJob}) {
      EXPECT_THAT(bob.Change(verb, change), StatusCodeIs(absl::StatusCode::kNotFound));
    }
    v1::DiffJobsRequest diff;
    diff.set_before(name);
    diff.set_after(name);
    EXPECT_THAT(bob.Call(bob.jobs(), &v1::JobService::Stub::DiffJobs, diff), StatusCodeIs(absl::StatusCode::kNotFound));
    grpc::ClientContext context;
    v1::TailLogsRequest tail;
    tail.set_id(name);
    v1::LogChunk chunk;
    const auto stream = bob.jobs().TailLogs(&context, tail);
    EXPECT_FALSE(stream->Read(&chunk));
    EXPECT_THAT(FromGrpc(stream->Finish()), StatusCodeIs(absl::StatusCode::kNotFound));
  }
  EXPECT_EQ(bob.List()->jobs_size(), 0);
  EXPECT_EQ(As("ann").List()->jobs_size(), 1);
  EXPECT_EQ(As("root").List()->jobs_size(), 1);
  // The same request id is another request for another tenant, and a foreign prefix is not ambiguous.
  v1::CreateJobRequest other;
  other.set_job_id("secret-other");
  other.set_request_id("r1");
  const auto own = bob.Create(other);
  ASSERT_THAT(own, IsOk());
  EXPECT_EQ(bob.Get("secret")->id(), "secret-other");
  other.mutable_policy()->set_tenant("physics");
  other.set_job_id("");
  EXPECT_THAT(bob.Create(other), StatusCodeIs(kDenied));
}

// Goal: a revoked token is worth nothing at once, a new one works without a restart, and a broken file changes nothing.
TEST_F(GuardedServerTest, PrincipalsAreReadAgain) {
  Add("root", "admin");
  Add("ann", "submitter", "default");
  Start();
  EXPECT_THAT(As("ann").List(), IsOk());
  std::filesystem::remove(principals());
  Add("root", "admin");
  EXPECT_EQ(ReasonOf(As("ann").List().status()), "BAD_TOKEN");
  EXPECT_THAT(As("root").List(), IsOk());
  Add("bob", "viewer", "default");
  EXPECT_THAT(As("bob").List(), IsOk());
  ASSERT_THAT(WriteFileAtomically(principals(), "principals: [{name: X}]"), IsOk());
  EXPECT_THAT(As("bob").List(), IsOk());
}

// Goal: one greedy caller is held back with a time to try again; others and workers are not.
TEST_F(GuardedServerTest, RateIsLimited) {
  Add("ann", "submitter", "default");
  Add("bob", "viewer", "default");
  Add("gpu", "worker");
  Start({.gate = {.limits = {.rate_per_second = 5, .concurrent_calls = 3}}});
  Caller ann = As("ann");
  Status refused;
  int admitted = 0;
  for (int i = 0; i < 40; ++i) {
    const Status status = ann.List().status();
    admitted += status.ok();
    if (!status.ok()) refused = status;
  }
  EXPECT_GE(admitted, 10);
  EXPECT_LE(admitted, 20);
  EXPECT_EQ(ReasonOf(refused), "RATE_LIMITED");
  ASSERT_TRUE(RetryAfterOf(refused).has_value());
  std::this_thread::sleep_for(*RetryAfterOf(refused) + std::chrono::milliseconds(50));
  EXPECT_THAT(ann.List(), IsOk());
  EXPECT_THAT(As("bob").List(), IsOk());
  FakeWorker worker(As("gpu").channel(), "w");
  for (int i = 0; i < 40; ++i) EXPECT_THAT(worker.Synchronize(worker.Request({}, 0), 600), IsOk());
}

// Goal: the audit log names every change and every refusal, with who and what came of it, and holds no token.
TEST_F(GuardedServerTest, AuditLogTellsWhoDidWhat) {
  Add("ann", "submitter", "default");
  Add("eve", "viewer", "default");
  Start();
  v1::CreateJobRequest request;
  request.set_job_id("j");
  request.set_request_id("req-7");
  ASSERT_THAT(As("ann").Create(request), IsOk());
  EXPECT_THAT(As("eve").Create(request), StatusCodeIs(kDenied));
  EXPECT_THAT(Caller(MakeChannel(server_.address())).List(), StatusCodeIs(kUnauthenticated));
  EXPECT_THAT(As("eve").List(), IsOk());
  server_.Stop();
  const std::string text = *ReadFile(folder_.path() / "audit.jsonl");
  EXPECT_THAT(text, HasSubstr("\"principal\":\"ann\",\"role\":\"submitter\",\"tenant\":\"default\""));
  EXPECT_THAT(text, HasSubstr("\"method\":\"JobService/CreateJob\",\"resource\":\"tenants/default/jobs/j\",\"request_id\":\"req-7\","
                              "\"outcome\":\"OK\""));
  EXPECT_THAT(text, HasSubstr("\"outcome\":\"PERMISSION_DENIED\",\"reason\":\"ROLE_NOT_ALLOWED\""));
  EXPECT_THAT(text, HasSubstr("\"outcome\":\"UNAUTHENTICATED\",\"reason\":\"NO_TOKEN\""));
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 3);
  for (const auto& [name, token] : tokens_) EXPECT_THAT(text, Not(HasSubstr(token)));
}

// Goal: TLS lets in who believes the authority, and nobody in the clear; a replaced certificate is used for the next handshake.
TEST_F(GuardedServerTest, TlsIsSpokenAndCertificatesAreReadAgain) {
  Certificates authority(folder_.path(), "authority"), stranger(folder_.path(), "stranger");
  if (!authority.ok()) GTEST_SKIP() << "no openssl program";
  Add("ann", "submitter", "default");
  const TlsFiles server = authority.Issue("server");
  Start({.security = {.tls = {.certificate = server.certificate, .key = server.key}, .reload = kReload}});
  const auto list = [&](const TlsFiles& tls, const std::string& name = "ann") {
    ChannelSecurity security = TokenOf(name);
    security.tls = tls;
    return Caller(*MakeChannel(server_.address(), security)).List().status();
  };
  EXPECT_THAT(list({.authority = server.authority}), IsOk());
  EXPECT_THAT(list({.authority = folder_.path() / "stranger.pem"}), StatusCodeIs(absl::StatusCode::kUnavailable));
  EXPECT_THAT(As("ann").List(), StatusCodeIs(absl::StatusCode::kUnavailable));
  // The server's certificate comes from the other authority now.
  stranger.Issue("server");
  Status seen = absl::UnknownError("");
  for (int i = 0; i < 60 && !seen.ok(); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(100));
    seen = list({.authority = folder_.path() / "stranger.pem"});
  }
  EXPECT_THAT(seen, IsOk());
}

// Goal: with mutual TLS a certificate of the authority is needed to get in at all, and its name is enough to be known.
TEST_F(GuardedServerTest, ClientCertificateIsIdentity) {
  Certificates authority(folder_.path(), "authority"), stranger(folder_.path(), "stranger");
  if (!authority.ok()) GTEST_SKIP() << "no openssl program";
  Add("gpu", "worker", "", "gpu-1");
  Add("ann", "submitter", "default");
  const TlsFiles server = authority.Issue("server"), gpu = authority.Issue("gpu-1"), unknown = authority.Issue("unknown");
  TlsFiles forged = stranger.Issue("gpu-1-forged");
  forged.authority = server.authority;
  Start({.security = {.tls = server, .reload = kReload}});
  const auto call = [&](const TlsFiles& tls, bool token) {
    ChannelSecurity security = token ? TokenOf("ann") : ChannelSecurity{};
    security.tls = tls;
    const auto channel = *MakeChannel(server_.address(), security);
    return token ? Caller(channel).List().status() : FakeWorker(channel, "w").Next(2'000).status();
  };
  EXPECT_THAT(call(gpu, false), IsOk());
  EXPECT_THAT(call(unknown, false), StatusCodeIs(kUnauthenticated));
  EXPECT_THAT(call(unknown, true), IsOk());  // the token says who it is
  EXPECT_THAT(call({.authority = server.authority}, true), StatusCodeIs(absl::StatusCode::kUnavailable));
  EXPECT_THAT(call(forged, true), StatusCodeIs(absl::StatusCode::kUnavailable));
}

// Goal: what would be unsafe is refused before anything is sent or opened.
TEST_F(GuardedServerTest, UnsafeWaysAreRefused) {
  ASSERT_THAT(WriteFileAtomically(folder_.path() / "t", "rf_x"), IsOk());
  EXPECT_THAT(MakeChannel("198.51.100.1:7433", {.token_file = folder_.path() / "t"}),
              StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("in the clear")));
  EXPECT_THAT(MakeChannel("127.0.0.1:1", {.token_file = folder_.path() / "none"}), StatusCodeIs(absl::StatusCode::kNotFound));
  EXPECT_THAT(MakeServerCredentials("0.0.0.0:1", {}), StatusCodeIs(absl::StatusCode::kFailedPrecondition));
  EXPECT_THAT(MakeServerCredentials("0.0.0.0:1", {.insecure_anywhere = true}), IsOk());
  EXPECT_THAT(server_.Start({.gate = {.principals = folder_.path() / "nobody.yaml"}}),
              StatusIs(absl::StatusCode::kNotFound, HasSubstr("names nobody")));
}

// The health service's answer as its raw bytes: "\x08\x01" is SERVING, "\x08\x02" NOT_SERVING.
StatusOr<std::string> Health(const std::string& address, const std::string& service) {
  grpc::GenericStub stub(MakeChannel(address));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(5));
  const std::string bytes = service.empty() ? "" : Join("\x0a", std::string(1, static_cast<char>(service.size())), service);
  const grpc::Slice slice(bytes);
  const grpc::ByteBuffer request(&slice, 1);
  grpc::CompletionQueue queue;
  const auto call = stub.PrepareUnaryCall(&context, "/grpc.health.v1.Health/Check", request, &queue);
  call->StartCall();
  grpc::ByteBuffer response;
  grpc::Status status;
  call->Finish(&response, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  RF_RETURN_IF_ERROR(FromGrpc(status));
  grpc::Slice whole;
  RF_RETURN_IF_ERROR(FromGrpc(response.DumpToSingleSlice(&whole)));
  return std::string(reinterpret_cast<const char*>(whole.begin()), whole.size());
}

// Goal: health tells a coordinator that reads its log from one that serves; calls meanwhile say when to come back, and the real server
// takes over the address.
TEST_F(GuardedServerTest, HealthTellsRecoveringFromServing) {
  auto recovery = RecoveryServer::Start("127.0.0.1:0", {});
  ASSERT_THAT(recovery, IsOk());
  const std::string address = (*recovery)->address();
  for (const char* service : {"", "refinery.v1.JobService", "refinery.v1.WorkerService"}) {
    EXPECT_THAT(Health(address, service), refinery::testing::IsOkAndHolds(std::string("\x08\x02")));
  }
  FakeWorker early(MakeChannel(address), "w");
  const Status refused = early.Next().status();
  EXPECT_THAT(refused, StatusCodeIs(absl::StatusCode::kUnavailable));
  EXPECT_EQ(ReasonOf(refused), "RECOVERING");
  EXPECT_EQ(RetryAfterOf(refused), std::chrono::milliseconds(1000));
  recovery->reset();
  ServerOptions options{.listen = address};
  Status started = server_.Start(options);
  for (int i = 0; i < 100 && absl::IsUnavailable(started); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
    server_.Stop();
    started = server_.Start(options);
  }
  ASSERT_THAT(started, IsOk());
  for (const char* service : {"", "refinery.v1.JobService", "refinery.v1.AdminService"}) {
    EXPECT_THAT(Health(address, service), refinery::testing::IsOkAndHolds(std::string("\x08\x01")));
  }
  EXPECT_THAT(early.Next(), IsOk());
}

}  // namespace
}  // namespace refinery::api
