#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <fstream>
#include <thread>

#include "tests/support/status_matchers.h"
#include "tests/worker/task/generate/small_tokenizer.h"
#include "tests/worker/task/model/tiny_models.h"
#include "worker/task/generate/engine.h"
#include "worker/task/generate/forward.h"

namespace refinery::generate {
namespace {

using model::TinyModel;
using model::TinyVectors;
using nlohmann::json;
using ::refinery::testing::IsOk;
using ::refinery::testing::StatusIs;
using ::testing::AllOf;
using ::testing::HasSubstr;

constexpr SamplingSettings kGreedy = {.temperature = 0};

std::vector<int32_t> Ids(const json& list) { return list.get<std::vector<int32_t>>(); }

void Drive(Engine& engine) {
  while (engine.Step()) {
  }
}

// Goal: log-probabilities are those of the model's own logits, whatever the sampling.  Oracle: transformers' logits and
// log-sum-exp of the prompt's last position (tests/vectors/model).
TEST(EngineStepTest, LogProbsAreTheLogSoftmaxOfTransformersLogits) {
  for (const char* name : {"llama", "qwen3"}) {
    const json vectors = TinyVectors(name);
    Engine engine(TinyModel(vectors, at::kFloat), {.max_batch = 2});
    for (const json& answer : vectors["answers"]) {
      for (const SamplingSettings& sampling : {kGreedy, SamplingSettings{.temperature = 3, .repetition_penalty = 1.5}}) {
        Completion completion;
        const Request request{.prompt = Ids(answer["ids"]), .max_new_tokens = 1, .sampling = sampling, .top_log_probs = 4};
        ASSERT_THAT(engine.Submit(request, [&](const Completion& c) { completion = c; }), IsOk());
        Drive(engine);
        const auto logits = answer["last_logits"].get<std::vector<double>>();
        const double norm = answer["log_sum_exp"].back().get<double>();
        ASSERT_EQ(completion.log_probs.size(), 1);
        const TokenLogProb& p = completion.log_probs[0];
        EXPECT_EQ(p.token, completion.tokens[0]);
        EXPECT_NEAR(p.log_prob, logits[static_cast<size_t>(p.token)] - norm, 2e-5);
        std::vector<double> sorted = logits;
        std::ranges::sort(sorted, std::greater());
        ASSERT_EQ(p.top.size(), 4);
        for (size_t i = 0; i < 4; ++i) EXPECT_NEAR(p.top[i].second, sorted[i] - norm, 2e-5);
      }
    }
  }
}

// Goal: requests that join while others run get the text they get alone; pieces join to the answer.  Oracle: transformers'
// greedy text.
TEST(EngineStepTest, RequestsJoinAndLeaveAtAnyStep) {
  const json vectors = TinyVectors("qwen3");
  Engine engine(TinyModel(vectors, at::kFloat), {.max_batch = 2, .max_step_tokens = 5});
  constexpr size_t kCount = 9;
  std::vector<Completion> completions(kCount);
  std::vector<std::vector<int32_t>> pieces(kCount);
  std::vector<int64_t> longest(kCount);
  for (size_t i = 0; i < kCount; ++i) {
    const size_t which = i % vectors["greedy"].size();
    Request request{.prompt = Ids(vectors["answers"][which]["ids"]), .max_new_tokens = 24, .sampling = kGreedy};
    request.on_piece = [&, i](const Piece& piece) {
      pieces[i].insert(pieces[i].end(), piece.tokens.begin(), piece.tokens.end());
      longest[i] = std::max(longest[i], static_cast<int64_t>(piece.tokens.size()));
    };
    ASSERT_THAT(engine.Submit(std::move(request), [&, i](const Completion& c) { completions[i] = c; }), IsOk());
    for (size_t step = 0; step < i; ++step) engine.Step();
  }
  Drive(engine);
  for (size_t i = 0; i < kCount; ++i) {
    EXPECT_EQ(completions[i].tokens, Ids(vectors["greedy"][i % vectors["greedy"].size()])) << i;
    EXPECT_EQ(pieces[i], completions[i].tokens);
    EXPECT_EQ(longest[i], 1);  // as they come, not at the end
  }
  EXPECT_FALSE(engine.Step());
}

// Goal: a cancelled request ends with what it has, waiting ones end with nothing, the others go on as if alone; also when another
// thread cancels.
TEST(EngineStepTest, SingleRequestsCanBeCancelled) {
  const json vectors = TinyVectors("qwen3");
  const std::vector<int32_t> text = Ids(vectors["greedy"][0]);
  Engine engine(TinyModel(vectors, at::kFloat), {.max_batch = 2});
  std::vector<Completion> completions(4);
  std::vector<uint64_t> ids;
  for (size_t i = 0; i < 4; ++i) {
    const StatusOr<uint64_t> id =
        engine.Submit({.prompt = Ids(vectors["answers"][0]["ids"]), .max_new_tokens = 24, .sampling = kGreedy},
                      [&, i](const Completion& c) { completions[i] = c; });
    ASSERT_THAT(id, IsOk());
    ids.push_back(*id);
  }
  for (int i = 0; i < 6; ++i) engine.Step();
  std::thread([&] { engine.Cancel(ids[0]); }).join();
  engine.Cancel(ids[3]);
  engine.Cancel(999);
  Drive(engine);
  EXPECT_EQ(completions[0].finish_reason, "cancelled");
  EXPECT_GT(completions[0].tokens.size(), 2);
  EXPECT_LT(completions[0].tokens.size(), 24);
  EXPECT_TRUE(std::equal(completions[0].tokens.begin(), completions[0].tokens.end(), text.begin()));
  EXPECT_EQ(completions[3].finish_reason, "cancelled");
  EXPECT_TRUE(completions[3].tokens.empty());
  for (size_t i : {1, 2}) EXPECT_EQ(completions[i].tokens, text);
  size_t cancelled = 0;
  for (int i = 0; i < 5; ++i) {
    ASSERT_THAT(engine.Submit({.prompt = {1}, .max_new_tokens = 200}, [&](const Completion& c) { cancelled += c.finish_reason == "cancelled"; }), IsOk());
    engine.Step();
  }
  engine.CancelAll();
  EXPECT_FALSE(engine.Step());
  EXPECT_EQ(cancelled, 5);
}

// Goal: several threads submit and cancel while one drives; every request ends exactly once.
TEST(EngineStepTest, ThreadsSubmitWhileOneDrives) {
  Engine engine(TinyModel(TinyVectors("llama"), at::kFloat), {.max_batch = 4, .min_capacity = 64});
  std::atomic<int> done = 0, submitted = 0, writers = 3;
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < 40; ++i) {
        const auto id = engine.Submit({.prompt = {1 + t, 2 + i % 7}, .max_new_tokens = 1 + i % 9}, [&](const Completion&) { ++done; });
        submitted += id.ok();
        if (i % 6 == 0) engine.Cancel(*id);
      }
      --writers;
    });
  }
  while (engine.Step() || writers > 0) {
  }
  for (std::thread& thread : threads) thread.join();
  Drive(engine);
  EXPECT_EQ(submitted, 120);
  EXPECT_EQ(done, 120);
}

// Goal: the cache never takes more than the budget, whatever comes; what can never fit is refused, what does not fit now waits
// and gets the text it gets alone.
TEST(EngineStepTest, TheCacheStaysWithinItsBudget) {
  const json vectors = TinyVectors("qwen3");
  const auto tiny = TinyModel(vectors, at::kFloat);
  const int64_t two_short = MakeForward(tiny)->CacheBytes(2, 64), one_long = MakeForward(tiny)->CacheBytes(1, 128);
  Engine engine(tiny, {.max_batch = 8, .memory_budget = std::max(two_short, one_long)});
  const std::vector<int32_t> prompt = Ids(vectors["answers"][0]["ids"]);
  EXPECT_THAT(engine.Submit({.prompt = prompt, .max_new_tokens = 200}),
              StatusIs(absl::StatusCode::kResourceExhausted,
                       AllOf(HasSubstr("takes " + std::to_string(MakeForward(tiny)->CacheBytes(1, 212)) + " bytes"),
                             HasSubstr("memory_budget allows " + std::to_string(std::max(two_short, one_long))))));
  std::vector<Completion> completions(12);
  for (size_t i = 0; i < completions.size(); ++i) {
    const Request request{.prompt = prompt, .max_new_tokens = i % 4 == 2 ? 100 : 24, .sampling = kGreedy};
    ASSERT_THAT(engine.Submit(request, [&, i](const Completion& c) { completions[i] = c; }), IsOk());
  }
  int64_t most_slots = 0;
  while (engine.Step()) {
    EXPECT_LE(engine.statistics().cache_bytes, std::max(two_short, one_long));
    most_slots = std::max(most_slots, engine.statistics().slots);
  }
  EXPECT_EQ(most_slots, 2);
  for (size_t i = 0; i < completions.size(); ++i) {
    std::vector<int32_t> start = completions[i].tokens;
    EXPECT_EQ(start.size(), i % 4 == 2 ? 100 : 24);
    start.resize(24);
    EXPECT_EQ(start, Ids(vectors["greedy"][0])) << i;
  }
}

// Goal: the bytes that the engine counts are those that the caches take.  Oracle: the allocator, by the tensors' own sizes in a
// double model, whose cache is plain tensors.
TEST(EngineStepTest, CacheBytesCountPlainTensors) {
  const json vectors = TinyVectors("qwen3");  // 2 layers, 2 key-value heads of 16 dimensions
  EXPECT_EQ(MakeForward(TinyModel(vectors, at::kDouble))->CacheBytes(3, 40), 2 * 3 * 40 * 2 * 2 * 16 * 8);
  EXPECT_GE(MakeForward(TinyModel(vectors, at::kFloat))->CacheBytes(3, 40), 2 * 3 * 40 * 2 * 2 * 16 * 4);
}

// Goal: text, stop strings and streaming agree.  Oracle: the tokens' text as a whole, cut by hand.
TEST(EngineStepTest, StopStringsEndTheTextAcrossTokens) {
  const testing::SmallTokenizer small("smollm");
  const json vectors = TinyVectors("qwen3");
  Engine engine(TinyModel(vectors, at::kFloat), {.max_batch = 3, .tokenizer = small.get()});
  const Request base{.prompt = Ids(vectors["answers"][0]["ids"]), .max_new_tokens = 24, .sampling = kGreedy};
  const std::string whole = *small.get()->Decode(Ids(vectors["greedy"][0]));
  ASSERT_GT(whole.size(), 12);
  for (size_t begin = 0; begin + 3 < whole.size(); ++begin) {
    const std::string stop = whole.substr(begin, 3);
    Request request = base;
    request.stop_strings = {"never there", stop};
    std::string streamed;
    request.on_piece = [&](const Piece& piece) { streamed += piece.text; };
    Completion completion;
    ASSERT_THAT(engine.Submit(request, [&](const Completion& c) { completion = c; }), IsOk());
    Drive(engine);
    EXPECT_EQ(completion.text, whole.substr(0, whole.find(stop)));
    EXPECT_EQ(streamed, completion.text);
    EXPECT_EQ(completion.finish_reason, "stop");
    EXPECT_LE(completion.tokens.size(), 24);
  }
}

// Goal: what is passed on while a request runs never has to be taken back when an id sequence stops it.
TEST(EngineStepTest, StopSequencesAreWithheldFromThePieces) {
  const json vectors = TinyVectors("qwen3");  // greedy: 45 45 6 5 3 40 39 33 6 11 ...
  Engine engine(TinyModel(vectors, at::kFloat), {});
  for (const std::vector<int32_t>& stop : {std::vector<int32_t>{5, 3, 40}, {45, 6, 5, 9}, {45, 45, 6, 5}, {39}}) {
    Request request{.prompt = Ids(vectors["answers"][0]["ids"]), .max_new_tokens = 8, .sampling = kGreedy};
    request.stop_sequences = {stop};
    std::vector<int32_t> passed;
    request.on_piece = [&](const Piece& piece) { passed.insert(passed.end(), piece.tokens.begin(), piece.tokens.end()); };
    Completion completion;
    ASSERT_THAT(engine.Submit(request, [&](const Completion& c) { completion = c; }), IsOk());
    Drive(engine);
    EXPECT_EQ(passed, completion.tokens);
  }
}

// Goal: answers under a JSON schema parse and fit it, whatever the model would like to say, and end by themselves.  Oracle: a
// JSON parser and the schema, read by hand.
TEST(EngineStepTest, JsonSchemaConstrainsAnyModel) {
  const testing::SmallTokenizer small("smollm");
  json config = TinyVectors("llama");
  config["config"]["vocab_size"] = 450;  // some rows more than the tokenizer has ids
  Engine engine(TinyModel(config, at::kFloat), {.max_batch = 4, .tokenizer = small.get()});
  const std::string schema =
      R"({"type":"object","properties":{"name":{"type":"string","maxLength":5},"n":{"type":"integer","minimum":0,"maximum":99},)"
      R"("kind":{"enum":["a","b"]}},"required":["name","n","kind"],"additionalProperties":false,)"
      R"("x-guidance":{"whitespace_flexible":false}})";
  std::vector<Completion> completions(6);
  for (size_t i = 0; i < completions.size(); ++i) {
    Request request{.prompt = {5, 6, 7}, .max_new_tokens = 200, .sampling = {.temperature = 1.5}, .seed = i};
    request.constraint = {Constraint::Kind::kJsonSchema, schema};
    ASSERT_THAT(engine.Submit(std::move(request), [&, i](const Completion& c) { completions[i] = c; }), IsOk());
  }
  Drive(engine);
  for (const Completion& completion : completions) {
    SCOPED_TRACE(completion.text);
    EXPECT_EQ(completion.finish_reason, "end");
    const json value = json::parse(completion.text, nullptr, false);
    ASSERT_TRUE(value.is_object() && value.size() == 3);
    EXPECT_TRUE(value["name"].is_string());
    EXPECT_TRUE(value["n"].is_number_integer() && value["n"] >= 0 && value["n"] <= 99);
    EXPECT_TRUE(value["kind"] == "a" || value["kind"] == "b");
  }
  Request wrong{.prompt = {5}};
  wrong.constraint = {Constraint::Kind::kJsonSchema, "{\"type\": 7}"};
  EXPECT_THAT(engine.Submit(wrong), StatusIs(absl::StatusCode::kInvalidArgument, HasSubstr("")));
}

}  // namespace
}  // namespace refinery::generate
