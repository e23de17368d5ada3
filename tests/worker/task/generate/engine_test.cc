#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <numeric>

#include "tests/support/status_matchers.h"
#include "tests/worker/task/model/tiny_models.h"
#include "worker/task/generate/engine.h"
#include "worker/task/generate/latency.h"

namespace refinery::generate {
namespace {

using model::TinyModel;
using model::TinyVectors;
using nlohmann::json;
using ::refinery::testing::IsOk;
using ::refinery::testing::StatusIs;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr SamplingSettings kGreedy = {.temperature = 0};

std::vector<Completion> Complete(const std::shared_ptr<model::CausalLm>& model, const std::vector<Request>& requests, int64_t max_batch) {
  runtime::NullReporter reporter;
  StatusOr<std::vector<Completion>> completions = Engine(model, {.max_batch = max_batch}).Generate(requests, reporter);
  EXPECT_THAT(completions, IsOk());
  return completions.ok() ? *std::move(completions) : std::vector<Completion>(requests.size());
}

std::vector<int32_t> Ids(const json& list) { return list.get<std::vector<int32_t>>(); }

class GreedyTest : public ::testing::TestWithParam<std::tuple<const char*, at::ScalarType, int64_t>> {};
INSTANTIATE_TEST_SUITE_P(All, GreedyTest,
                         ::testing::Combine(::testing::ValuesIn(model::kTinyModels), ::testing::Values(at::kFloat, at::kDouble),
                                            ::testing::Values(1, 2, 8)));

// Goal: greedy text equals transformers' generate, on the CPU kernels (float32) and in plain ATen (float64), whatever the
// batch. The prompts have different lengths, so that they decode at different positions.
TEST_P(GreedyTest, EqualsTransformers) {
  const auto& [name, dtype, max_batch] = GetParam();
  const json vectors = TinyVectors(name);
  std::vector<Request> requests;
  for (size_t i = 0; i < vectors["greedy"].size(); ++i) {
    requests.push_back({.prompt = Ids(vectors["answers"][i]["ids"]), .max_new_tokens = 24, .sampling = kGreedy});
  }
  const std::vector<Completion> completions = Complete(TinyModel(vectors, dtype), requests, max_batch);
  for (size_t i = 0; i < requests.size(); ++i) {
    EXPECT_EQ(completions[i].tokens, Ids(vectors["greedy"][i])) << i;
    EXPECT_EQ(completions[i].finish_reason, "length");
  }
}

// Goal: 200 greedy tokens of a trained model, as transformers made them; alone and beside others that share prefixes.
TEST(EngineTest, Stories260KGreedyEqualsTransformers) {
  if (model::StoriesFolder().empty()) GTEST_SKIP() << "../shared/data/models/stories260K is absent";
  std::ifstream file(model::StoriesFolder() + "/golden.json");
  const std::vector<int32_t> ids = Ids(json::parse(file)["ids"]);
  const auto stories = model::StoriesModel(at::kFloat);
  std::vector<Request> requests;
  for (size_t prompt : {size_t{1}, size_t{1}, size_t{40}, size_t{80}, size_t{100}}) {
    requests.push_back({.prompt = {ids.begin(), ids.begin() + static_cast<std::ptrdiff_t>(prompt)},
                        .max_new_tokens = static_cast<int64_t>(ids.size() - prompt),
                        .sampling = kGreedy});
  }
  for (int64_t max_batch : {1, 3, 16}) {
    const std::vector<Completion> completions = Complete(stories, requests, max_batch);
    for (size_t i = 0; i < requests.size(); ++i) {
      std::vector<int32_t> text = requests[i].prompt;
      text.insert(text.end(), completions[i].tokens.begin(), completions[i].tokens.end());
      EXPECT_EQ(text, ids) << "batch " << max_batch << ", request " << i;
    }
  }
}

// Twelve sampled requests, some with the same prompt.
std::vector<Request> SampledRequests() {
  std::vector<Request> requests;
  for (int i = 0; i < 12; ++i) {
    Request request{.prompt = {1, 5, 9}, .max_new_tokens = 5 + 3 * (i % 4), .sampling = {.temperature = 0.8, .top_p = 0.9},
                    .seed = static_cast<uint64_t>(100 + i)};
    for (int t = 0; t < 12 * (i % 5); ++t) request.prompt.push_back((7 * t + i % 2) % 61);
    requests.push_back(request);
  }
  return requests;
}

// Goal: a request's text depends on its seed, not on its batch mates.  Method: batches of 1, 4 and 16, and reversed order.
TEST(EngineTest, TextDoesNotDependOnBatchMates) {
  const auto tiny = TinyModel(TinyVectors("qwen3"), at::kFloat);
  std::vector<Request> requests = SampledRequests();
  const std::vector<Completion> alone = Complete(tiny, requests, 1);
  for (int64_t max_batch : {4, 16}) {
    const std::vector<Completion> together = Complete(tiny, requests, max_batch);
    for (size_t i = 0; i < requests.size(); ++i) EXPECT_EQ(together[i].tokens, alone[i].tokens) << i;
  }
  std::ranges::reverse(requests);
  const std::vector<Completion> reversed = Complete(tiny, requests, 4);
  for (size_t i = 0; i < requests.size(); ++i) EXPECT_EQ(reversed[i].tokens, alone[requests.size() - 1 - i].tokens) << i;
  std::vector<Request> twins(2, requests[0]);
  twins[1].seed += 1;
  twins[0].max_new_tokens = twins[1].max_new_tokens = 30;
  const std::vector<Completion> pair = Complete(tiny, twins, 2);
  EXPECT_NE(pair[0].tokens, pair[1].tokens);
}

// Goal: every way to end.  Oracle: the greedy text that transformers made, cut by hand.
TEST(EngineTest, EndsAtEndIdsStopSequencesAndLengths) {
  const json vectors = TinyVectors("qwen3");
  const std::vector<int32_t> text = Ids(vectors["greedy"][0]);  // 45 45 6 5 3 40 39 33 6 11 ...
  ASSERT_THAT(std::vector<int32_t>(text.begin(), text.begin() + 8), ElementsAre(45, 45, 6, 5, 3, 40, 39, 33));
  const Request base{.prompt = Ids(vectors["answers"][0]["ids"]), .max_new_tokens = 20, .sampling = kGreedy};
  std::vector<Request> requests(6, base);
  requests[0].end_ids = {60, 3};
  requests[1].stop_sequences = {{9, 9}, {3, 40, 39}};
  requests[2].max_new_tokens = 1;
  requests[3].max_new_tokens = 0;
  requests[4].stop_sequences = {{21, 45}};  // straddles the prompt: not a stop
  requests[4].max_new_tokens = 4;
  requests[5].max_new_tokens = 1000;        // the model ends at 256 positions
  std::vector<size_t> done;
  runtime::NullReporter reporter;
  Engine engine(TinyModel(vectors, at::kFloat), {.max_batch = 2});
  const std::vector<Completion> completions = *engine.Generate(requests, reporter, [&](size_t index, const Completion& c) {
    done.push_back(index);
    EXPECT_FALSE(c.finish_reason.empty());
  });
  EXPECT_THAT(completions[0].tokens, ElementsAre(45, 45, 6, 5));
  EXPECT_EQ(completions[0].finish_reason, "end");
  EXPECT_THAT(completions[1].tokens, ElementsAre(45, 45, 6, 5));
  EXPECT_EQ(completions[1].finish_reason, "stop");
  EXPECT_THAT(completions[2].tokens, ElementsAre(45));
  EXPECT_EQ(completions[2].finish_reason, "length");
  EXPECT_TRUE(completions[3].tokens.empty());
  EXPECT_EQ(completions[3].finish_reason, "length");
  EXPECT_THAT(completions[4].tokens, ElementsAre(45, 45, 6, 5));
  EXPECT_EQ(completions[5].tokens.size(), 256 - base.prompt.size());
  std::ranges::sort(done);
  EXPECT_THAT(done, ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_TRUE(Complete(TinyModel(vectors, at::kFloat), {}, 2).empty());
}

struct CancellingReporter final : runtime::Reporter {
  void Report(const runtime::Progress& progress) override { last = progress; }
  void Note(const std::string&, const std::string&) override {}
  void CheckpointReady(const std::string&, uint64_t) override {}
  void Check() override {
    if (--checks < 0) throw runtime::CancelledException();
  }
  int checks = 1000;
  runtime::Progress last;
};

TEST(EngineTest, ReportsAndCanBeCancelled) {
  const json vectors = TinyVectors("llama");
  Engine engine(TinyModel(vectors, at::kFloat), {.max_batch = 2});
  const std::vector<Request> requests(3, {.prompt = {1, 2}, .max_new_tokens = 7, .sampling = kGreedy});
  CancellingReporter reporter;
  EXPECT_THAT(engine.Generate(requests, reporter), IsOk());
  EXPECT_EQ(reporter.last.tokens_generated, 21);
  EXPECT_EQ(reporter.last.done, 3);
  EXPECT_EQ(reporter.last.total, 3);
  EXPECT_GT(reporter.last.tokens_per_second, 0);
  reporter.checks = 3;
  EXPECT_THROW((void)engine.Generate(requests, reporter), runtime::CancelledException);
  reporter.checks = 1000;
  EXPECT_EQ(engine.Generate(requests, reporter)->size(), 3);  // usable after
}

TEST(EngineTest, WrongRequestsAreRefusedByName) {
  Engine engine(TinyModel(TinyVectors("llama"), at::kFloat), {.max_batch = 1});
  const auto refused = [&](const Request& request, const char* message) {
    EXPECT_THAT(engine.Submit(request), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr(message)));
  };
  refused({.prompt = {}}, "the prompt has 0 tokens; the model takes 1 to 256");
  refused({.prompt = {1, 61}}, "the prompt holds the token 61");
  refused({.prompt = {-1}}, "the prompt holds the token -1");
  refused({.prompt = std::vector<int32_t>(300, 1)}, "the prompt has 300 tokens");
  refused({.prompt = {1}, .max_new_tokens = -1}, "max_new_tokens is -1");
  refused({.prompt = {1}, .sampling = {.top_p = 1.5}}, "top_p is 1.5");
  refused({.prompt = {1}, .stop_strings = {"x"}}, "need an engine with a tokenizer");
  runtime::NullReporter reporter;
  EXPECT_THAT(engine.Generate({{.prompt = {1}}, {.prompt = {70}}}, reporter),
              StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("request 1: the prompt holds the token 70")));
  EXPECT_FALSE(engine.Step());  // nothing is left behind
}

// Goal: a request whose logits are not finite ends with an error that names it; Generate throws, so that the trial counts as
// infeasible.
TEST(EngineTest, LogitsThatAreNotFiniteNameTheRequest) {
  const auto tiny = TinyModel(TinyVectors("llama"), at::kFloat);
  tiny->layers[1].down.weight.fill_(std::nan(""));
  runtime::NullReporter reporter;
  Engine engine(tiny, {.max_batch = 2});
  EXPECT_THROW((void)engine.Generate({{.prompt = {1}, .sampling = kGreedy}}, reporter), runtime::NumericException);
  Completion completion;
  EXPECT_THAT(engine.Submit({.prompt = {1, 2}}, [&](const Completion& c) { completion = c; }), IsOk());
  while (engine.Step()) {
  }
  EXPECT_EQ(completion.finish_reason, "error");
  EXPECT_THAT(completion.error, StatusIs(absl::StatusCode::kOutOfRange, HasSubstr("token 0 of the answer")));
}

TEST(LatencyTest, MeasuresAPositiveTime) {
  const double milliseconds = MillisecondsPerToken(*TinyModel(TinyVectors("llama"), at::kBFloat16), 40, 8);
  EXPECT_GT(milliseconds, 0);
  EXPECT_LT(milliseconds, 1000);
}

}  // namespace
}  // namespace refinery::generate
