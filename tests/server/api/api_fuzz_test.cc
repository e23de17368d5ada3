// A stateful fuzz of the API: each byte string is a script of calls, good and malformed, against a real coordinator over loopback,
// with a simple model of what must be true beside it. Scripts come from seeds and from tests/server/api/corpus.
//
// After every call: no INTERNAL, UNKNOWN or DATA_LOSS; an acknowledged job is found and listed once; a job that ended stays so;
// validate_only changes nothing and foretells what the call would say; a repeated request id answers the same.

#include <gmock/gmock.h>
#include <grpcpp/generic/generic_stub.h>
#include <gtest/gtest.h>

#include <map>
#include <random>
#include <set>

#include "common/channel.h"
#include "common/error_details.h"
#include "tests/server/api/fake_worker.h"
#include "tests/server/api/test_server.h"
#include "tests/support/status_matchers.h"

namespace refinery::api {
namespace {

using refinery::testing::Caller;
using refinery::testing::FakeWorker;
using refinery::testing::IsOk;
using refinery::testing::TestServer;
using Stub = v1::JobService::Stub;

// The script: bytes that decide.
class Script {
 public:
  explicit Script(std::string bytes) : bytes_(std::move(bytes)) {}
  bool done() const { return next_ >= bytes_.size(); }
  unsigned Pick(unsigned count) { return done() ? 0 : static_cast<unsigned char>(bytes_[next_++]) % count; }
  std::string Bytes(size_t count) {
    const std::string part = next_ < bytes_.size() ? bytes_.substr(next_, count) : "";
    next_ += count;
    return part;
  }

 private:
  const std::string bytes_;
  size_t next_ = 0;
};

bool IsOurFault(const Status& status) {
  return absl::IsInternal(status) || absl::IsUnknown(status) || absl::IsDataLoss(status) || absl::IsUnavailable(status) ||
         absl::IsDeadlineExceeded(status);
}

class Fuzz {
 public:
  Fuzz(TestServer& server, std::string script)
      : script_(std::move(script)), caller_(MakeChannel(server.address())), worker_(caller_.channel(), "w"), server_(server) {}

  void Run() {
    while (!script_.done() && !::testing::Test::HasFailure()) Step();
    CheckList();
  }

 private:
  void Step() {
    switch (script_.Pick(10)) {
      case 0: return Create();
      case 1:
      case 2:
      case 3: return Change();
      case 4: return Get();
      case 5: return List();
      case 6: return Work();
      case 7: return Garbage();
      case 8: return Update();
      default: return Watch();
    }
  }

  std::string SomeId() {
    if (jobs_.empty() || script_.Pick(8) == 0) {
      static const char* const kOdd[] = {"", "nothing", "tenants/", "tenants/default/jobs/", "../..", "t", "\x01", "a/b"};
      return kOdd[script_.Pick(8)];
    }
    auto it = jobs_.begin();
    std::advance(it, script_.Pick(static_cast<unsigned>(jobs_.size())));
    return script_.Pick(5) == 0 ? Join("tenants/default/jobs/", it->first) : it->first;
  }

  // Takes a reply in: what it says must not contradict what was said before.
  void Check(const StatusOr<v1::Job>& job, const char* what) {
    EXPECT_FALSE(IsOurFault(job.status())) << what << ": " << job.status();
    if (!job.ok()) return;
    EXPECT_NE(job->state(), v1::Job::STATE_UNSPECIFIED) << what;
    EXPECT_LE(job->tasks_done(), job->tasks_total()) << what;
    EXPECT_EQ(job->name(), Join("tenants/default/jobs/", job->id()));
    EXPECT_FALSE(job->etag().empty());
    v1::Job& before = jobs_[job->id()];
    EXPECT_GE(job->as_of_seq(), before.as_of_seq()) << what << ": time went back";
    if (before.state() == v1::Job::SUCCEEDED) {
      EXPECT_EQ(job->state(), v1::Job::SUCCEEDED) << what;
    }
    before = *job;
  }

  void Create() {
    v1::CreateJobRequest request;
    const unsigned kind = script_.Pick(6);
    request.set_request_id(kind == 1 ? "bad id!" : kind == 2 ? Join("r", script_.Pick(3)) : "");
    *request.mutable_recipe() = refinery::testing::TinyRecipe();
    if (kind == 3) request.mutable_recipe()->mutable_distill()->set_temperature(-1);
    if (kind == 4) request.mutable_recipe()->ParseFromString(script_.Bytes(20));
    if (script_.Pick(3) == 0) request.set_job_id(script_.Pick(2) == 0 ? Join("job-", script_.Pick(3)) : script_.Bytes(3));
    request.mutable_policy()->set_priority(static_cast<int32_t>(script_.Pick(5)) * 600 - 1200);
    if (script_.Pick(6) == 0) request.mutable_policy()->set_tenant(script_.Bytes(4));
    if (jobs_.size() >= 12) request.set_validate_only(true);
    // A tenant that happens to be a good name is another tenant: then the name differs from the model's.
    if (request.policy().tenant() != "") request.set_validate_only(true);
    const StatusOr<v1::Job> job = caller_.Create(request);
    if (request.validate_only()) {
      EXPECT_FALSE(IsOurFault(job.status())) << job.status();
      return;
    }
    Check(job, "CreateJob");
    if (!job.ok() || request.request_id().empty()) return;
    const StatusOr<v1::Job> again = caller_.Create(request);
    ASSERT_THAT(again, IsOk());
    EXPECT_EQ(again->id(), job->id());
  }

  void Change() {
    static const Caller::Verb kVerbs[] = {&Stub::PauseJob, &Stub::ResumeJob, &Stub::RetryJob, &Stub::KillJob};
    const Caller::Verb verb = kVerbs[script_.Pick(script_.Pick(3) == 0 ? 4 : 3)];
    v1::ChangeJobRequest request;
    request.set_id(SomeId());
    request.set_reason(script_.Bytes(script_.Pick(4)));
    if (script_.Pick(6) == 0) request.set_etag("e0");
    request.set_validate_only(true);
    const StatusOr<v1::Job> foretold = caller_.Change(verb, request);
    Check(foretold, "validate_only");
    request.set_validate_only(false);
    if (script_.Pick(4) == 0) request.set_request_id(Join("c", ++request_));
    const StatusOr<v1::Job> job = caller_.Change(verb, request);
    Check(job, "change");
    EXPECT_EQ(foretold.status().code(), job.status().code()) << foretold.status() << " but " << job.status();
    if (!job.ok() || request.request_id().empty()) return;
    Check(caller_.Change(verb, request), "repeated change");
    request.set_reason("another");
    EXPECT_EQ(ReasonOf(caller_.Change(verb, request).status()), "REQUEST_ID_REUSED");
  }

  void Get() { Check(caller_.Get(SomeId()), "GetJob"); }

  void Update() {
    v1::UpdateJobRequest request;
    request.set_id(SomeId());
    request.mutable_policy()->set_priority(static_cast<int32_t>(script_.Pick(9)) * 300 - 1200);
    if (script_.Pick(4) == 0) request.mutable_policy()->ParseFromString(script_.Bytes(12));
    Check(caller_.Call(caller_.jobs(), &Stub::UpdateJob, request), "UpdateJob");
  }

  void List() {
    v1::ListJobsRequest request;
    static const char* const kFilters[] = {"", "state = RUNNING", "priority > 0", "NOT id : job", "state =", "\xff", "((((", "x = y"};
    static const char* const kOrders[] = {"", "priority desc", "id", "state, create_time_ms desc", "nothing", "id,,"};
    request.set_filter(kFilters[script_.Pick(8)]);
    request.set_order_by(kOrders[script_.Pick(6)]);
    request.set_page_size(static_cast<int32_t>(script_.Pick(6)) - 1);
    if (script_.Pick(5) == 0) request.set_page_token(script_.Bytes(10));
    const StatusOr<v1::ListJobsResponse> page = caller_.List(request);
    EXPECT_FALSE(IsOurFault(page.status())) << page.status();
    if (page.ok() && request.page_size() > 0) {
      EXPECT_LE(page->jobs_size(), request.page_size());
    }
  }

  // A worker does something: takes a lease, finishes one, fails one, lies.
  void Work() {
    static const v1::FailureClass kClasses[] = {v1::INFRA, v1::USER, v1::NUMERIC, v1::RESOURCE};
    const StatusOr<v1::Lease> lease = worker_.Next(400);
    EXPECT_FALSE(absl::IsInternal(lease.status())) << lease.status();
    if (!lease.ok() || lease->token().path().empty()) return;
    v1::CompleteTaskRequest request;
    const unsigned kind = script_.Pick(8);
    if (kind == 0) {
      *request.mutable_lease() = lease->token();
      request.mutable_error()->set_failure_class(kClasses[script_.Pick(4)]);
      request.mutable_error()->set_message(script_.Bytes(4));
    } else {
      StatusOr<v1::CompleteTaskRequest> success = worker_.MakeSuccess(*lease);
      ASSERT_THAT(success, IsOk());
      request = *success;
      if (kind == 1) request.mutable_lease()->set_epoch(request.lease().epoch() + script_.Pick(3));
      if (kind == 2) request.mutable_success()->mutable_output()->set_digest(script_.Bytes(5));
    }
    const Status status = worker_.Complete(request);
    EXPECT_FALSE(IsOurFault(status)) << status;
  }

  // Bytes that are no request; gRPC itself answers INTERNAL or INVALID_ARGUMENT, the server lives on.
  void Garbage() {
    static const char* const kMethods[] = {"JobService/CreateJob", "JobService/UpdateJob", "WorkerService/Synchronize",
                                           "AdminService/SetTenant", "JobService/NoSuchMethod"};
    grpc::GenericStub stub(caller_.channel());
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(5));
    const grpc::Slice slice(script_.Bytes(24));
    const grpc::ByteBuffer request(&slice, 1);
    grpc::CompletionQueue queue;
    const auto call = stub.PrepareUnaryCall(&context, Join("/refinery.v1.", kMethods[script_.Pick(5)]), request, &queue);
    call->StartCall();
    grpc::ByteBuffer response;
    grpc::Status status;
    call->Finish(&response, &status, nullptr);
    void* tag = nullptr;
    bool ok = false;
    queue.Next(&tag, &ok);
    EXPECT_NE(status.error_code(), grpc::StatusCode::UNAVAILABLE) << status.error_message();
    EXPECT_THAT(caller_.Version(), IsOk());
  }

  // A watch from a random place: the numbers rise, and all are after the place.
  void Watch() {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::milliseconds(50));
    v1::WatchJobRequest request;
    request.set_id(SomeId());
    request.set_after_seq(script_.Pick(2) == 0 ? 0 : script_.Pick(200));
    const auto stream = caller_.jobs().WatchJob(&context, request);
    uint64_t last = request.after_seq();
    v1::WatchJobResponse response;
    while (stream->Read(&response)) {
      if (!response.has_event()) continue;
      EXPECT_GT(response.event().seq(), last);
      last = response.event().seq();
    }
    const Status status = FromGrpc(stream->Finish());
    EXPECT_FALSE(absl::IsInternal(status) || absl::IsUnknown(status)) << status;
  }

  // Every job that was acknowledged is there, once, over pages of three.
  void CheckList() {
    std::multiset<std::string> listed;
    v1::ListJobsRequest request;
    request.set_page_size(3);
    request.set_order_by("priority");
    do {
      const StatusOr<v1::ListJobsResponse> page = caller_.List(request);
      ASSERT_THAT(page, IsOk());
      for (const v1::Job& job : page->jobs()) listed.insert(job.id());
      request.set_page_token(page->next_page_token());
    } while (!request.page_token().empty());
    for (const auto& [id, job] : jobs_) EXPECT_EQ(listed.count(id), 1u) << id;
    EXPECT_EQ(listed.size(), jobs_.size());
  }

  Script script_;
  Caller caller_;
  FakeWorker worker_;
  TestServer& server_;
  std::map<std::string, v1::Job> jobs_;
  int request_ = 0;
};

void RunScript(const std::string& script) {
  TestServer server;
  ASSERT_THAT(server.Start(), IsOk());
  Fuzz(server, script).Run();
}

TEST(ApiFuzzTest, RandomScriptsKeepThePromises) {
  const char* first = std::getenv("REFINERY_FUZZ_SEED");
  const char* count = std::getenv("REFINERY_FUZZ_RUNS");
  const unsigned begin = first == nullptr ? 1 : static_cast<unsigned>(std::atoi(first));
  const unsigned runs = count == nullptr ? 12 : static_cast<unsigned>(std::atoi(count));
  for (unsigned seed = begin; seed < begin + runs && !HasFailure(); ++seed) {
    SCOPED_TRACE(Join("REFINERY_FUZZ_SEED=", seed, " REFINERY_FUZZ_RUNS=1"));
    std::mt19937 random(seed);
    std::string script(600, '\0');
    for (char& byte : script) byte = static_cast<char>(random());
    RunScript(script);
  }
}

TEST(ApiFuzzTest, CorpusKeepsThePromises) {
  const std::filesystem::path folder = std::filesystem::path(REFINERY_SOURCE_DIR) / "tests/server/api/corpus";
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    SCOPED_TRACE(entry.path().string());
    RunScript(*ReadFile(entry.path()));
    ++files;
  }
  EXPECT_GE(files, 3);
}

}  // namespace
}  // namespace refinery::api
