// Changes of jobs over the wire: what each verb does, request ids, etags, dry runs, pages, and what changed between two jobs.

#include <gmock/gmock.h>
#include <gtest/gtest.h>

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
using refinery::testing::StatusCodeIs;
using refinery::testing::StatusIs;
using refinery::testing::TestServer;
using ::testing::HasSubstr;
using Stub = v1::JobService::Stub;

class ChangesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_THAT(server_.Start(), IsOk());
    caller_ = Caller(MakeChannel(server_.address()));
  }
  StatusOr<v1::Job> Change(Caller::Verb verb, const std::string& id, const std::string& request_id = "", const std::string& etag = "",
                           bool validate_only = false) {
    v1::ChangeJobRequest request;
    request.set_id(id);
    request.set_request_id(request_id);
    request.set_etag(etag);
    request.set_validate_only(validate_only);
    return caller_.Change(verb, request);
  }
  void RunJob(const std::string& id) {
    FakeWorker worker(caller_.channel(), "w1");
    for (int i = 0; i < 300; ++i) {
      const auto lease = worker.Next();
      ASSERT_THAT(lease, IsOk());
      if (!lease->token().path().empty()) {
        ASSERT_THAT(worker.Run(*lease), IsOk());
      } else if (caller_.Get(id)->state() >= v1::Job::SUCCEEDED) {
        return;
      }
    }
    FAIL() << "the job did not end";
  }

  TestServer server_;
  Caller caller_;
};

// Goal: a paused job gets no leases until it is resumed; a killed one ends at once; a cancelled one can be opened again.
TEST_F(ChangesTest, VerbsDoWhatTheySay) {
  const std::string id = caller_.Create()->id();
  FakeWorker worker(caller_.channel(), "w1");
  EXPECT_EQ(Change(&Stub::PauseJob, id)->state(), v1::Job::PAUSED);
  EXPECT_EQ(worker.Next()->token().path(), "");
  EXPECT_EQ(caller_.Get(id)->tasks(0).reason_code(), "WAIT_PAUSED");
  EXPECT_NE(Change(&Stub::ResumeJob, id)->state(), v1::Job::PAUSED);
  EXPECT_EQ(worker.Next()->token().path(), "import/student");
  EXPECT_EQ(Change(&Stub::KillJob, id)->state(), v1::Job::CANCELLED);
  EXPECT_THAT(Change(&Stub::PauseJob, id), StatusIs(absl::StatusCode::kFailedPrecondition, HasSubstr("was cancelled")));
  EXPECT_THAT(Change(&Stub::RetryJob, id), IsOk());
  RunJob(id);
  EXPECT_EQ(caller_.Get(id)->state(), v1::Job::SUCCEEDED) << caller_.Get(id)->reason();
}

// Goal: a late copy of an old call does not undo what came after it; an id stands for one call; a stale etag is refused.
TEST_F(ChangesTest, RequestIdsAndEtagsGuardChanges) {
  const v1::Job job = *caller_.Create();
  EXPECT_THAT(Change(&Stub::PauseJob, job.id(), "p1", "e1"), StatusCodeIs(absl::StatusCode::kAborted));
  EXPECT_EQ(ReasonOf(Change(&Stub::PauseJob, job.id(), "p1", "e1").status()), "ETAG_MISMATCH");
  EXPECT_EQ(Change(&Stub::PauseJob, job.id(), "p1", job.etag())->state(), v1::Job::PAUSED);
  EXPECT_NE(Change(&Stub::ResumeJob, job.id(), "r1")->state(), v1::Job::PAUSED);
  EXPECT_NE(Change(&Stub::PauseJob, job.id(), "p1", job.etag())->state(), v1::Job::PAUSED);  // the copy
  EXPECT_EQ(ReasonOf(Change(&Stub::KillJob, job.id(), "p1").status()), "REQUEST_ID_REUSED");
  EXPECT_EQ(FieldOf(Change(&Stub::KillJob, job.id(), "no spaces").status()), "request_id");
  const std::string etag = caller_.Get(job.id())->etag();
  EXPECT_THAT(Change(&Stub::KillJob, job.id(), "k", "", true), IsOk());
  EXPECT_EQ(caller_.Get(job.id())->etag(), etag);  // a dry run leaves no trace
}

// Goal: what cannot be done says in one sentence how the job stands and what to do instead, and the dry run says the same.
TEST_F(ChangesTest, WrongStatesAreAnsweredInWords) {
  const std::string id = caller_.Create()->id();
  const auto words = [&](Caller::Verb verb) {
    const std::string dry = Message(Change(verb, id, "", "", true).status());
    EXPECT_EQ(dry, Message(Change(verb, id).status()));
    return dry;
  };
  FakeWorker worker(caller_.channel(), "w1");
  ASSERT_THAT(worker.Next(), IsOk());
  ASSERT_EQ(Change(&Stub::PauseJob, id)->state(), v1::Job::PAUSED);
  EXPECT_EQ(words(&Stub::RetryJob), Join("job ", id, " is paused; `refinery resume ", id, "` lets it go on"));
  ASSERT_THAT(Change(&Stub::ResumeJob, id), IsOk());
  v1::CancelJobRequest cancel;
  cancel.set_id(id);
  ASSERT_EQ(caller_.Call(caller_.jobs(), &Stub::CancelJob, cancel)->state(), v1::Job::CANCELLING);
  EXPECT_EQ(words(&Stub::RetryJob), Join("job ", id, " is being cancelled; wait until it has ended, then retry it"));
  EXPECT_THAT(words(&Stub::PauseJob), HasSubstr("is being cancelled; wait until it has ended"));
  ASSERT_EQ(Change(&Stub::KillJob, id)->state(), v1::Job::CANCELLED);
  EXPECT_EQ(words(&Stub::ResumeJob),
            Join("job ", id, " was cancelled; there is nothing to resume; `refinery retry ", id, "` opens it again"));
  EXPECT_EQ(words(&Stub::PauseJob),
            Join("job ", id, " was cancelled; there is nothing to pause; `refinery retry ", id, "` opens it again"));
  EXPECT_EQ(Change(&Stub::KillJob, id)->state(), v1::Job::CANCELLED);  // as wanted
}

// Goal: the same across a restart of the coordinator, for jobs and tenants; an id stands for one kind of call, also CreateJob's.
TEST_F(ChangesTest, RequestIdsOutliveTheProcess) {
  v1::CreateJobRequest create;
  create.set_request_id("c1");
  const std::string id = caller_.Create(create)->id();
  ASSERT_EQ(Change(&Stub::PauseJob, id, "p1")->state(), v1::Job::PAUSED);
  ASSERT_EQ(Change(&Stub::PauseJob, id, "p2")->state(), v1::Job::PAUSED);  // changes nothing, but was answered
  ASSERT_NE(Change(&Stub::ResumeJob, id, "r1")->state(), v1::Job::PAUSED);
  v1::SetTenantRequest light, heavy;
  light.mutable_tenant()->set_name("physics");
  light.mutable_tenant()->set_weight(2);
  light.set_request_id("t1");
  heavy = light;
  heavy.mutable_tenant()->set_weight(5);
  heavy.set_request_id("t2");
  using Admin = v1::AdminService::Stub;
  ASSERT_THAT(caller_.Call(caller_.admin(), &Admin::SetTenant, light), IsOk());
  ASSERT_THAT(caller_.Call(caller_.admin(), &Admin::SetTenant, heavy), IsOk());

  server_.Stop();
  ASSERT_THAT(server_.Start(), IsOk());
  caller_ = Caller(MakeChannel(server_.address()));
  EXPECT_EQ(caller_.Create(create)->id(), id);
  for (const char* late : {"p1", "p2"}) EXPECT_NE(Change(&Stub::PauseJob, id, late)->state(), v1::Job::PAUSED) << late;
  EXPECT_EQ(caller_.Call(caller_.admin(), &Admin::SetTenant, light)->weight(), 5);
  EXPECT_EQ(ReasonOf(Change(&Stub::KillJob, id, "p1").status()), "REQUEST_ID_REUSED");
  EXPECT_EQ(ReasonOf(Change(&Stub::KillJob, id, "c1").status()), "REQUEST_ID_REUSED");
  create.set_request_id("p1");
  EXPECT_EQ(ReasonOf(caller_.Create(create).status()), "REQUEST_ID_REUSED");
}

TEST_F(ChangesTest, UpdateChangesThePolicyButNotTheTenant) {
  v1::CreateJobRequest create;
  create.mutable_policy()->set_priority(3);
  create.mutable_policy()->set_tenant("physics");
  const v1::Job job = *caller_.Create(create);
  EXPECT_EQ(job.priority(), 3);
  EXPECT_EQ(job.name(), Join("tenants/physics/jobs/", job.id()));
  v1::UpdateJobRequest update;
  update.set_id(job.name());
  update.mutable_policy()->set_priority(-7);
  const auto changed = caller_.Call(caller_.jobs(), &Stub::UpdateJob, update);
  ASSERT_THAT(changed, IsOk());
  EXPECT_EQ(changed->priority(), -7);
  EXPECT_EQ(changed->tenant(), "physics");
  update.mutable_policy()->set_tenant("biology");
  EXPECT_EQ(FieldOf(caller_.Call(caller_.jobs(), &Stub::UpdateJob, update).status()), "policy.tenant");
  update.mutable_policy()->clear_tenant();
  update.mutable_policy()->set_priority(5'000);
  EXPECT_THAT(caller_.Call(caller_.jobs(), &Stub::UpdateJob, update), StatusCodeIs(absl::StatusCode::kInvalidArgument));
}

// Goal: an order is the same over any page size, a token fits its list only, and survives a restart of the server.
TEST_F(ChangesTest, PagesOfAnOrder) {
  std::vector<std::pair<int, std::string>> expected;
  for (const int priority : {5, -5, 5, 0, 7}) {
    v1::CreateJobRequest create;
    create.mutable_policy()->set_priority(priority);
    expected.insert(expected.begin(), {priority, caller_.Create(create)->id()});  // newest first among equals
  }
  std::stable_sort(expected.begin(), expected.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  v1::ListJobsRequest request;
  request.set_order_by("priority desc");
  request.set_page_size(2);
  std::vector<std::string> listed;
  do {
    const auto page = caller_.List(request);
    ASSERT_THAT(page, IsOk());
    for (const v1::Job& job : page->jobs()) listed.push_back(job.id());
    request.set_page_token(page->next_page_token());
    if (listed.size() == 2) {
      server_.Stop();
      ASSERT_THAT(server_.Start(), IsOk());
      caller_ = Caller(MakeChannel(server_.address()));
      v1::ListJobsRequest other = request;
      other.set_filter("priority > 0");
      EXPECT_EQ(FieldOf(caller_.List(other).status()), "page_token");
      other = request;
      other.mutable_page_token()->front() ^= 1;  // the last character may end in bits that stand for nothing
      EXPECT_THAT(caller_.List(other), StatusCodeIs(absl::StatusCode::kInvalidArgument));
    }
  } while (!request.page_token().empty());
  ASSERT_EQ(listed.size(), expected.size());
  for (size_t i = 0; i < listed.size(); ++i) EXPECT_EQ(listed[i], expected[i].second) << i;
  request.set_filter("priority = 5 OR priority = 7");
  request.set_page_size(0);
  EXPECT_EQ(caller_.List(request)->jobs_size(), 3);
}

TEST_F(ChangesTest, RecipeErrorsNameTheField) {
  v1::CreateJobRequest create;
  *create.mutable_recipe() = refinery::testing::TinyRecipe();
  create.mutable_recipe()->mutable_distill()->set_temperature(-1);
  EXPECT_EQ(FieldOf(caller_.Create(create).status()), "recipe.distill.temperature");
  EXPECT_EQ(ResourceOf(caller_.Get("none").status()), "job/none");
}

// Goal: quotas are set, shown and kept to.
TEST_F(ChangesTest, QuotaOfATenantIsKept) {
  v1::SetTenantRequest set;
  set.mutable_tenant()->set_name("physics");
  set.mutable_tenant()->set_weight(2);
  set.mutable_tenant()->set_max_jobs(1);
  ASSERT_THAT(caller_.Call(caller_.admin(), &v1::AdminService::Stub::SetTenant, set), IsOk());
  v1::CreateJobRequest create;
  create.mutable_policy()->set_tenant("physics");
  ASSERT_THAT(caller_.Create(create), IsOk());
  EXPECT_THAT(caller_.Create(create), StatusCodeIs(absl::StatusCode::kResourceExhausted));
  create.set_validate_only(true);
  EXPECT_THAT(caller_.Create(create), StatusCodeIs(absl::StatusCode::kResourceExhausted));
  const auto tenants = caller_.Call(caller_.admin(), &v1::AdminService::Stub::ListTenants, v1::ListTenantsRequest());
  ASSERT_EQ(tenants->tenants_size(), 1);
  EXPECT_EQ(tenants->tenants(0).weight(), 2);
  EXPECT_EQ(tenants->tenants(0).jobs(), 1u);
}

// Goal: what waits because the coordinator drains says so.
TEST_F(ChangesTest, ADrainIsTheReason) {
  const auto job = caller_.Create();
  ASSERT_THAT(job, IsOk());
  FakeWorker worker(caller_.channel(), "w1");
  ASSERT_THAT(worker.Synchronize(worker.Request({}, 0)), IsOk());
  v1::DrainCoordinatorRequest drain;
  drain.set_drain(true);
  ASSERT_THAT(caller_.Call(caller_.admin(), &v1::AdminService::Stub::DrainCoordinator, drain), IsOk());
  v1::GetJobRequest get;
  get.set_id(job->id());
  const auto found = caller_.Call(caller_.jobs(), &Stub::GetJob, get);
  ASSERT_THAT(found, IsOk());
  bool told = false;
  for (const v1::Task& task : found->tasks()) told |= task.reason_code() == "WAIT_DRAINING";
  EXPECT_TRUE(told) << found->ShortDebugString();
}

TEST_F(ChangesTest, DrainedWorkerGetsNothing) {
  ASSERT_THAT(caller_.Create(), IsOk());
  FakeWorker worker(caller_.channel(), "w1");
  ASSERT_THAT(worker.Synchronize(worker.Request({}, 0)), IsOk());
  v1::DrainWorkerRequest drain;
  drain.set_worker("w1");
  drain.set_drain(true);
  EXPECT_EQ(caller_.Call(caller_.admin(), &v1::AdminService::Stub::DrainWorker, drain)->state(), "draining");
  EXPECT_EQ(worker.Next()->token().path(), "");
  drain.set_drain(false);
  ASSERT_THAT(caller_.Call(caller_.admin(), &v1::AdminService::Stub::DrainWorker, drain), IsOk());
  EXPECT_EQ(worker.Next()->token().path(), "import/student");
  drain.set_worker("nobody");
  EXPECT_EQ(ResourceOf(caller_.Call(caller_.admin(), &v1::AdminService::Stub::DrainWorker, drain).status()), "worker/nobody");
}

// Goal: a job with another number of bits takes everything before quantization out of the cache, and the diff names that field.
TEST_F(ChangesTest, DiffNamesTheFieldThatChanged) {
  const std::string before = caller_.Create()->id();
  RunJob(before);
  v1::CreateJobRequest create;
  *create.mutable_recipe() = refinery::testing::TinyRecipe();
  v1::Gptq* gptq = create.mutable_recipe()->mutable_quantize()->mutable_gptq();
  const uint32_t bits = gptq->bits();
  gptq->set_bits(bits == 4 ? 8 : 4);
  const auto job = caller_.Create(create);
  ASSERT_THAT(job, IsOk());
  RunJob(job->id());
  v1::DiffJobsRequest request;
  request.set_before(before);
  request.set_after(job->id());
  const auto diff = caller_.Call(caller_.jobs(), &Stub::DiffJobs, request);
  ASSERT_THAT(diff, IsOk());
  int same = 0, bits_changed = 0;
  for (const v1::JobDiff::TaskDiff& task : diff->tasks()) {
    same += task.change() == v1::JobDiff::TaskDiff::SAME;
    if (task.kind() == v1::TRAIN || task.kind() == v1::CURATE) {
      EXPECT_EQ(task.change(), v1::JobDiff::TaskDiff::SAME) << task.DebugString();
    }
    if (task.kind() != v1::QUANTIZE) continue;
    EXPECT_EQ(task.change(), v1::JobDiff::TaskDiff::CHANGED);
    for (const v1::JobDiff::Cause& cause : task.causes()) {
      if (cause.field() != "quantize.gptq.bits") continue;
      EXPECT_EQ(cause.before(), Join(bits));
      ++bits_changed;
    }
  }
  EXPECT_GT(same, 5);
  EXPECT_GT(bits_changed, 0);
  request.set_after(before);
  const auto nothing = caller_.Call(caller_.jobs(), &Stub::DiffJobs, request);
  ASSERT_THAT(nothing, IsOk());
  for (const v1::JobDiff::TaskDiff& task : nothing->tasks()) {
    EXPECT_NE(task.change(), v1::JobDiff::TaskDiff::CHANGED) << task.DebugString();
  }
  const auto waiting = caller_.Create();  // nothing of it has run
  ASSERT_THAT(waiting, IsOk());
  request.set_before(waiting->id());
  request.set_after(waiting->id());
  const auto unknown = caller_.Call(caller_.jobs(), &Stub::DiffJobs, request);
  ASSERT_THAT(unknown, IsOk());
  for (const v1::JobDiff::TaskDiff& task : unknown->tasks()) {
    EXPECT_EQ(task.change(), v1::JobDiff::TaskDiff::NOT_REACHED) << task.DebugString();
  }
}

}  // namespace
}  // namespace refinery::api
