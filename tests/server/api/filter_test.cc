// Filters and orders of ListJobs. The parser is held against a second reading: random expressions are built as trees, written down
// and evaluated directly.

#include "server/api/filter.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "tests/support/status_matchers.h"

namespace refinery::api {
namespace {

using refinery::testing::IsOk;
using refinery::testing::StatusCodeIs;
using refinery::testing::StatusIs;
using ::testing::HasSubstr;

jobs::JobState MakeJob(const std::string& id, v1::Job::State state, int32_t priority, const std::string& owner) {
  jobs::JobState job;
  job.id = id;
  job.state = state;
  job.created.mutable_policy()->set_priority(priority);
  job.created.set_owner(owner);
  return job;
}

bool Matches(const std::string& filter, const jobs::JobState& job) {
  const auto predicate = ParseFilter(filter);
  EXPECT_THAT(predicate, IsOk()) << filter;
  return predicate.ok() && (*predicate)(job);
}

TEST(FilterTest, ComparesFields) {
  const jobs::JobState job = MakeJob("tiny-1", v1::Job::RUNNING, -3, "ann \"the\" boss");
  for (const char* yes : {"", "  ", "state = RUNNING", "state != FAILED", "priority = -3", "priority < 0 AND priority >= -3", "id : ny",
                          "owner = \"ann \\\"the\\\" boss\"", "owner : 'the'", "name = tenants/default/jobs/tiny-1", "tenant=default",
                          "NOT priority > 0", "(id = x OR id = tiny-1)", "tasks_done = 0 tasks_total"}) {
    if (std::string(yes).find("tasks_total") != std::string::npos) {
      EXPECT_FALSE(ParseFilter(yes).ok()) << yes;
    } else {
      EXPECT_TRUE(Matches(yes, job)) << yes;
    }
  }
  // As AIP-160 has it, OR binds tighter than AND.
  EXPECT_FALSE(Matches("id = tiny-1 OR id = x AND state = FAILED", job));
  EXPECT_TRUE(Matches("id = x AND id = y OR state = FAILED", MakeJob("x", v1::Job::FAILED, 0, "")));
  EXPECT_FALSE(Matches("id = x AND id = y OR state = FAILED", job));
}

TEST(FilterTest, MistakesAreNamed) {
  const std::pair<std::string, const char*> cases[] = {
      {"stat = RUNNING", "did you mean 'state'"}, {"state = RUNING", "state such as RUNNING"}, {"state < RUNNING", "= or !="},
      {"priority = high", "a number for priority"}, {"priority : 1", "priority is a number"}, {"id", "one of ="},
      {"id = ", "a value"}, {"id = a b", "AND, OR or the end"}, {"(id = a", "')'"}, {"id = \"a", "not closed"},
      {"AND", "no field"}, {"= a", "a field"}, {"id == a", "a value"}};
  for (const auto& [filter, words] : cases) {
    EXPECT_THAT(ParseFilter(filter), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(words))) << filter;
  }
  std::string deep(500, '('), wide = "id = a", negated;
  for (int i = 0; i < 200; ++i) wide += " OR id=a", negated += "NOT ";
  for (const std::string& text : {deep, wide, negated + "id = a", std::string(100'000, 'x')}) {
    EXPECT_THAT(ParseFilter(text), StatusCodeIs(absl::StatusCode::kInvalidArgument));
  }
  for (const char* order : {"nothing", "id up", "id,", ",", "id,id,id,id,id"}) {
    EXPECT_THAT(ParseOrder(order), StatusCodeIs(absl::StatusCode::kInvalidArgument)) << order;
  }
}

// An expression as a tree: its text, and what it says of a job with the given priority.
struct Tree {
  std::string text;
  std::function<bool(int)> holds;
};

Tree RandomTree(std::mt19937& random, int depth) {
  const auto pick = [&](int count) { return static_cast<int>(random() % static_cast<unsigned>(count)); };
  if (depth == 0 || pick(4) == 0) {
    const int value = pick(7) - 3;
    switch (pick(4)) {
      case 0: return {Join("priority = ", value), [value](int p) { return p == value; }};
      case 1: return {Join("priority!=", value), [value](int p) { return p != value; }};
      case 2: return {Join("priority <= ", value), [value](int p) { return p <= value; }};
      default: return {Join("priority>", value), [value](int p) { return p > value; }};
    }
  }
  const Tree a = RandomTree(random, depth - 1), b = RandomTree(random, depth - 1);
  switch (pick(3)) {
    case 0: return {Join("NOT (", a.text, ")"), [a](int p) { return !a.holds(p); }};
    case 1: return {Join("(", a.text, ") AND (", b.text, ")"), [a, b](int p) { return a.holds(p) && b.holds(p); }};
    default: return {Join("(", a.text, ") OR (", b.text, ")"), [a, b](int p) { return a.holds(p) || b.holds(p); }};
  }
}

TEST(FilterTest, RandomExpressionsMeanWhatTheirTreesSay) {
  std::mt19937 random(1);
  for (int i = 0; i < 300; ++i) {
    const Tree tree = RandomTree(random, 4);
    const auto predicate = ParseFilter(tree.text);
    ASSERT_THAT(predicate, IsOk()) << tree.text;
    for (int priority = -4; priority <= 4; ++priority) {
      EXPECT_EQ((*predicate)(MakeJob("j", v1::Job::RUNNING, priority, "")), tree.holds(priority)) << tree.text << " at " << priority;
    }
  }
}

// Goal: no text makes the parser crash or run on.  Method: random bytes, and good filters with bytes changed.
TEST(FilterTest, SurvivesAnyText) {
  std::mt19937 random(2);
  const std::string good = "state = RUNNING AND (owner : \"a\\\"b\" OR NOT priority >= -3)";
  for (int i = 0; i < 20'000; ++i) {
    std::string text = good;
    if (i % 2 == 0) text.resize(random() % 80);
    for (size_t k = random() % 5 + 1; k > 0 && !text.empty(); --k) text[random() % text.size()] = static_cast<char>(random());
    (void)ParseFilter(text).ok();
    (void)ParseOrder(text).ok();
  }
}

TEST(OrderTest, ComparesByFields) {
  const auto order = ParseOrder("priority desc, owner");
  ASSERT_THAT(order, IsOk());
  const auto a = SortValues(MakeJob("1", v1::Job::RUNNING, 5, "b"), *order), b = SortValues(MakeJob("2", v1::Job::RUNNING, 5, "a"), *order),
             c = SortValues(MakeJob("3", v1::Job::RUNNING, 10, "z"), *order);
  EXPECT_LT(Compare(c, a, *order), 0);
  EXPECT_LT(Compare(b, a, *order), 0);
  EXPECT_EQ(Compare(a, a, *order), 0);
}

}  // namespace
}  // namespace refinery::api
