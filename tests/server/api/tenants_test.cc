// Blobs belong to tenants: what one uploaded or made does not exist for another, whatever it asks; and it lasts over a restart.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <thread>

#include "common/digest.h"
#include "common/principals.h"
#include "refinery/v1/artifact_service.grpc.pb.h"
#include "tests/server/api/fake_worker.h"
#include "tests/server/api/test_server.h"
#include "tests/support/status_matchers.h"

namespace refinery::api {
namespace {

using refinery::testing::Caller;
using refinery::testing::FakeWorker;
using refinery::testing::IsOk;
using refinery::testing::StatusCodeIs;
using refinery::testing::TempFolder;
using refinery::testing::TestServer;
using ::testing::HasSubstr;

constexpr absl::StatusCode kNotFound = absl::StatusCode::kNotFound;
constexpr uint64_t kMaxBytes = 1 << 20;

class TenantsTest : public ::testing::Test {
 protected:
  void SetUp() override {
    for (const auto& [name, role, tenant] : {std::tuple{"ann", "submitter", "physics"}, {"amy", "viewer", "physics"},
                                             {"bob", "submitter", "biology"}, {"gpu", "worker", ""}, {"root", "admin", ""}}) {
      v1::PrincipalFile file = *ReadPrincipals(principals());
      v1::Principal* principal = file.add_principals();
      principal->set_name(name);
      principal->set_role(role);
      principal->set_tenant(tenant);
      const std::string token = *NewToken();
      principal->set_token_digest(DigestOf(token));
      ASSERT_THAT(WritePrincipals(principals(), file), IsOk());
      ASSERT_THAT(WriteFileAtomically(folder_.path() / name, token + "\n"), IsOk());
    }
    Start();
  }
  void Start() {
    ServerOptions options;
    options.gate.principals = principals();
    ASSERT_THAT(server_.Start(options), IsOk());
  }
  std::filesystem::path principals() const { return folder_.path() / "principals.yaml"; }
  Caller As(const std::string& name) {
    return Caller(*MakeChannel(server_.address(), ChannelSecurity{.token_file = folder_.path() / name}));
  }
  std::unique_ptr<v1::ArtifactService::Stub> Blobs(const std::string& name) {
    return v1::ArtifactService::NewStub(As(name).channel());
  }
  StatusOr<std::string> Upload(const std::string& name, const std::string& text) {
    TempFolder folder;
    RF_RETURN_IF_ERROR(WriteFileAtomically(folder.path() / "rows.jsonl", text));
    RF_ASSIGN_OR_RETURN(const v1::ArtifactRef ref, ArtifactClient(As(name).channel()).UploadFolder(folder.path(), "rows"));
    return ref.digest();
  }
  StatusOr<std::string> Read(const std::string& name, const std::string& artifact, const std::string& path = "rows.jsonl") {
    return ArtifactClient(As(name).channel()).ReadArtifactFile(artifact, path, kMaxBytes);
  }
  Status ReadBlob(const std::string& name, const std::string& digest) {
    const auto blobs = Blobs(name);
    grpc::ClientContext context;
    v1::ReadBlobRequest request;
    request.set_digest(digest);
    const auto reader = blobs->ReadBlob(&context, request);
    v1::ReadBlobResponse response;
    while (reader->Read(&response)) {
    }
    return FromGrpc(reader->Finish());
  }
  bool IsMissing(const std::string& name, const std::string& digest) {
    grpc::ClientContext context;
    v1::FindMissingBlobsRequest request;
    request.add_digests(digest);
    v1::FindMissingBlobsResponse response;
    EXPECT_TRUE(Blobs(name)->FindMissingBlobs(&context, request, &response).ok());
    return response.missing_size() == 1;
  }
  // {complete, committed bytes}
  std::pair<bool, uint64_t> WriteStatus(const std::string& name, const std::string& digest) {
    grpc::ClientContext context;
    v1::QueryWriteStatusRequest request;
    request.set_digest(digest);
    v1::QueryWriteStatusResponse response;
    EXPECT_TRUE(Blobs(name)->QueryWriteStatus(&context, request, &response).ok());
    return {response.complete(), response.committed_size()};
  }
  // Sends `bytes` at `offset` of a blob of `size` bytes; `finish` says that these are the last.
  Status Write(const std::string& name, const std::string& digest, uint64_t size, uint64_t offset, const std::string& bytes,
               bool finish) {
    const auto blobs = Blobs(name);
    grpc::ClientContext context;
    v1::WriteBlobResponse response;
    const auto writer = blobs->WriteBlob(&context, &response);
    v1::WriteBlobRequest request;
    request.set_digest(digest);
    request.set_size(size);
    request.set_offset(offset);
    request.set_data(bytes);
    request.set_finish(finish);
    (void)writer->Write(request);
    (void)writer->WritesDone();
    return FromGrpc(writer->Finish());
  }
  // A job whose files are this artifact.
  Status CreateWith(const std::string& name, const std::string& digest, bool validate_only = false,
                    const std::vector<std::string>& roles = refinery::testing::TinyFileRoles()) {
    v1::CreateJobRequest request;
    *request.mutable_recipe() = refinery::testing::TinyRecipe();
    for (const std::string& role : roles) (*request.mutable_files())[role] = digest;
    request.set_validate_only(validate_only);
    Caller caller = As(name);
    return caller.Call(caller.jobs(), &v1::JobService::Stub::CreateJob, request).status();
  }

  TempFolder folder_;
  TestServer server_;
};

// Goal: what ann uploaded is there for her tenant, admins and workers; for bob every answer is that of a blob that nobody has.
TEST_F(TenantsTest, UploadsOfOthersDoNotExist) {
  const auto artifact = Upload("ann", "ann's rows\n");
  ASSERT_THAT(artifact, IsOk());
  for (const char* name : {"ann", "amy", "gpu", "root"}) {
    EXPECT_EQ(Read(name, *artifact).value_or("-"), "ann's rows\n") << name;
    EXPECT_FALSE(IsMissing(name, *artifact)) << name;
  }
  const std::string file = DigestOf("ann's rows\n"), nothing = DigestOf("what nobody has");
  for (const std::string& digest : {*artifact, file}) {
    EXPECT_TRUE(IsMissing("bob", digest));
    EXPECT_EQ(WriteStatus("bob", digest), std::pair(false, uint64_t{0}));
    EXPECT_THAT(ReadBlob("bob", digest), StatusCodeIs(kNotFound));
    for (const bool validate_only : {false, true}) {
      const std::string words = Message(CreateWith("bob", digest, validate_only, {"seeds"}));
      std::string of_nothing = Message(CreateWith("bob", nothing, validate_only, {"seeds"}));
      for (size_t at; (at = of_nothing.find(nothing)) != std::string::npos;) of_nothing.replace(at, digest.size(), digest);
      EXPECT_EQ(words, of_nothing);
    }
  }
  EXPECT_EQ(Message(ReadBlob("bob", file)), Join("there is no blob ", file));
  EXPECT_EQ(Message(ReadBlob("bob", nothing)), Join("there is no blob ", nothing));
}

// Goal: a blob becomes bob's when he sends its bytes, and not before: neither by naming it in a manifest of his own, nor by the end of
// an upload that ann began, nor with other bytes.
TEST_F(TenantsTest, PossessionIsProvedByTheBytes) {
  const std::string bytes = "the rows of ann\n", digest = DigestOf(bytes);
  ASSERT_THAT(Upload("ann", bytes), IsOk());
  const std::string manifest = ManifestText({{.path = "rows.jsonl", .digest = digest, .size = bytes.size()}});
  ASSERT_THAT(Write("bob", DigestOf(manifest), manifest.size(), 0, manifest, true), IsOk());
  EXPECT_THAT(Message(CreateWith("bob", DigestOf(manifest))), HasSubstr("rows.jsonl"));
  EXPECT_THAT(ReadBlob("bob", digest), StatusCodeIs(kNotFound));
  EXPECT_THAT(Write("bob", digest, bytes.size(), 0, "the rows of bob\n", true), StatusCodeIs(absl::StatusCode::kInvalidArgument));
  EXPECT_THAT(ReadBlob("bob", digest), StatusCodeIs(kNotFound));

  const std::string other = "more rows of ann\n";
  EXPECT_FALSE(Write("ann", DigestOf(other), other.size(), 0, other.substr(0, 5), false).ok());  // it breaks off
  EXPECT_EQ(WriteStatus("ann", DigestOf(other)).second, 5u);
  EXPECT_EQ(WriteStatus("bob", DigestOf(other)).second, 0u);
  EXPECT_THAT(Write("bob", DigestOf(other), other.size(), 5, other.substr(5), true), StatusCodeIs(absl::StatusCode::kOutOfRange));
  ASSERT_THAT(Write("ann", DigestOf(other), other.size(), 5, other.substr(5), true), IsOk());
  EXPECT_THAT(ReadBlob("bob", DigestOf(other)), StatusCodeIs(kNotFound));

  const uint64_t blobs = server_.coordinator().blobs().total_blobs();
  ASSERT_THAT(Write("bob", digest, bytes.size(), 0, bytes, true), IsOk());
  EXPECT_THAT(ReadBlob("bob", digest), IsOk());
  EXPECT_THAT(ReadBlob("ann", digest), IsOk());
  EXPECT_THAT(CreateWith("bob", DigestOf(manifest)), IsOk());
  EXPECT_EQ(server_.coordinator().blobs().total_blobs(), blobs);  // there is one copy
}

// Goal: a caller of one tenant sees of a worker neither the artifacts of others in its cache nor where it is reached.
TEST_F(TenantsTest, WorkersTellNothingOfOthers) {
  FakeWorker worker(As("gpu").channel(), "w1");
  v1::SynchronizeRequest request = worker.Request();
  request.mutable_worker()->set_address("gpu-1.example");
  request.mutable_worker()->add_ports(4711);
  request.mutable_worker()->add_cached(DigestOf("of somebody"));
  ASSERT_THAT(worker.Synchronize(request), IsOk());
  for (const char* name : {"ann", "amy", "root"}) {
    Caller caller = As(name);
    const auto list = caller.Call(caller.jobs(), &v1::JobService::Stub::ListWorkers, v1::ListWorkersRequest());
    ASSERT_THAT(list, IsOk());
    ASSERT_EQ(list->workers_size(), 1);
    const int shown = std::string_view(name) == "root" ? 1 : 0;
    EXPECT_EQ(list->workers(0).cached_size(), shown) << name;
    EXPECT_EQ(list->workers(0).ports_size(), shown) << name;
    EXPECT_EQ(list->workers(0).address(), shown == 1 ? "gpu-1.example" : "") << name;
    EXPECT_EQ(list->workers(0).host(), "test");
  }
}

// A command that runs in every turn of the loop, slows it down and counts.
struct Ticker {
  Coordinator* coordinator;
  std::shared_ptr<std::atomic<int>> turns;
  std::shared_ptr<std::atomic<bool>> stop;
  void operator()(Coordinator::Turn&) const {
    ++*turns;
    std::this_thread::sleep_for(Milliseconds(20));
    if (!*stop) coordinator->Post(*this);
  }
};

// Goal: to ask for many blobs that others have takes the loop a turn or two, not one for each.
TEST_F(TenantsTest, ManyBlobsOfOthersAreOneLookUp) {
  constexpr int kBlobs = 300;
  v1::FindMissingBlobsRequest request;
  for (int i = 0; i < kBlobs; ++i) request.add_digests(*server_.coordinator().blobs().Put(Join("row ", i)));
  const Ticker ticker{&server_.coordinator(), std::make_shared<std::atomic<int>>(0), std::make_shared<std::atomic<bool>>(false)};
  server_.coordinator().Post(ticker);
  grpc::ClientContext context;
  v1::FindMissingBlobsResponse response;
  EXPECT_TRUE(Blobs("bob")->FindMissingBlobs(&context, request, &response).ok());
  const int turns = *ticker.turns;
  *ticker.stop = true;
  EXPECT_EQ(response.missing_size(), kBlobs);
  EXPECT_LT(turns, kBlobs / 2);
}

// Goal: what a job names is read on the loop once, and not much of it: large manifests are refused in words before they are read.
TEST_F(TenantsTest, ManifestsOfAJobAreBounded) {
  store::BlobStore& blobs = server_.coordinator().blobs();
  const std::string file = *blobs.Put("x");
  const auto manifest = [&](const std::string& prefix, int count) {
    std::vector<FileEntry> files;
    for (int i = 0; i < count; ++i) files.push_back({.path = Join(prefix, 1'000'000 + i), .digest = file, .size = 1});
    return *blobs.Put(ManifestText(std::move(files)));
  };
  EXPECT_THAT(Message(CreateWith("root", manifest("f", 51'000), true)), HasSubstr("bytes; at most 4194304 fit"));
  const std::string large = manifest("a", 40'000);
  std::vector<std::string> roles = refinery::testing::TinyFileRoles();
  for (int i = 0; i < 1'000; ++i) roles.push_back(Join("role", i));
  EXPECT_THAT(CreateWith("root", large, true, roles), IsOk());

  v1::CreateJobRequest request;
  *request.mutable_recipe() = refinery::testing::TinyRecipe();
  request.set_validate_only(true);
  (*request.mutable_files())["a"] = large;
  for (const char* other : {"b", "c"}) (*request.mutable_files())[other] = manifest(other, 40'000);
  Caller root = As("root");
  EXPECT_THAT(Message(root.Call(root.jobs(), &v1::JobService::Stub::CreateJob, request).status()),
              HasSubstr("more than 8388608 bytes together"));
}

// Goal: uploads and products belong to the same tenants after a restart; products to the tenant whose job made them.
TEST_F(TenantsTest, ProductsBelongToTheJobsTenantAndAllLasts) {
  const auto upload = Upload("bob", "bob's rows\n");
  ASSERT_THAT(upload, IsOk());
  const auto job = As("ann").Create();
  ASSERT_THAT(job, IsOk());
  FakeWorker worker(As("gpu").channel(), "w1");
  for (int i = 0; i < 200 && As("ann").Get(job->id())->state() < v1::Job::SUCCEEDED; ++i) {
    const auto lease = worker.Next();
    if (!lease.ok() || lease->token().job().empty()) continue;
    ASSERT_THAT(worker.Run(*lease), IsOk());
  }
  const auto done = As("ann").Get(job->id());
  ASSERT_EQ(done->state(), v1::Job::SUCCEEDED);
  for (const bool restart : {false, true}) {
    if (restart) {
      server_.Stop();
      Start();
    }
    for (const char* name : {"ann", "amy", "root"}) {
      EXPECT_THAT(Read(name, done->report().digest(), "report.md"), IsOk()) << name;
      EXPECT_THAT(Read(name, done->artifact().digest(), "out.txt"), IsOk()) << name;
    }
    EXPECT_THAT(Read("bob", done->artifact().digest(), "out.txt"), StatusCodeIs(kNotFound));
    EXPECT_THAT(Read("bob", *upload), IsOk());
    EXPECT_THAT(Read("ann", *upload), StatusCodeIs(kNotFound));
    EXPECT_THAT(CreateWith("bob", *upload), IsOk());  // the upload counts without being sent again
  }
  // What one job made may go into another of the same tenant.
  EXPECT_THAT(CreateWith("ann", done->report().digest()), IsOk());
}

}  // namespace
}  // namespace refinery::api
