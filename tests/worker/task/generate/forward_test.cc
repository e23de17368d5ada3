#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <gtest/gtest.h>

#include <array>
#include <atomic>

#include "tests/worker/task/model/tiny_models.h"
#include "worker/task/generate/cpu_product.h"
#include "worker/task/generate/forward.h"
#include "worker/task/generate/team.h"

namespace refinery::generate {
namespace {

using model::TinyModel;
using model::TinyVectors;

double MaxDifference(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

// Ids 0..60 in a fixed disorder.
std::vector<int64_t> Ids(int64_t count, int64_t seed) {
  std::vector<int64_t> ids;
  for (int64_t i = 0; i < count; ++i) ids.push_back((seed + 11 * i + 5 * i * i) % 61);
  return ids;
}

struct Case {
  const char* name;
  at::ScalarType dtype;
  bool aten;
  double tolerance;
};
class ForwardTest : public ::testing::TestWithParam<Case> {
 protected:
  std::shared_ptr<model::CausalLm> model_ = TinyModel(TinyVectors(GetParam().name), GetParam().dtype);
  std::unique_ptr<Forward> forward_ = GetParam().aten ? MakeAtenForward(model_) : MakeCpuForward(model_);
  const c10::InferenceMode inference_;

  at::Tensor Expected(const std::vector<int64_t>& ids) {
    return model_->Logits(model_->Hidden({at::tensor(ids, at::kLong), {static_cast<int64_t>(ids.size())}}))[-1];
  }
};
INSTANTIATE_TEST_SUITE_P(All, ForwardTest,
                         ::testing::Values(Case{"llama", at::kFloat, false, 1e-4}, Case{"llama", at::kFloat, true, 1e-4},
                                           Case{"llama_llama3_bias", at::kFloat, false, 1e-4},
                                           Case{"mistral_window", at::kFloat, false, 1e-4},
                                           Case{"mistral_window", at::kFloat, true, 1e-4},
                                           Case{"qwen2_mixed_window", at::kFloat, false, 1e-4},
                                           Case{"qwen3_mixed_window", at::kFloat, true, 1e-4},
                                           Case{"qwen2_mixed_window", at::kBFloat16, false, 0.2},
                                           Case{"qwen3", at::kFloat, false, 1e-4}, Case{"qwen3", at::kDouble, true, 1e-6},
                                           Case{"llama", at::kBFloat16, false, 0.2}, Case{"qwen3", at::kBFloat16, false, 0.1},
                                           Case{"qwen3", at::kBFloat16, true, 0.1}));

// Goal: the cache changes nothing.  Oracle: the forward pass without a cache (tested against transformers). Prefill in pieces
// that take the path for few and for many tokens, two slots at a time, then single tokens.
TEST_P(ForwardTest, CachedLogitsEqualThePlainPass) {
  const std::vector<int64_t> first = Ids(90, 3), second = Ids(70, 20);
  forward_->Reserve(3, 100);
  const auto step = [&](std::vector<std::array<int64_t, 3>> pieces) {  // {slot, begin, end}
    StepBatch batch;
    for (const auto& [slot, begin, end] : pieces) {
      const std::vector<int64_t>& ids = slot == 2 ? first : second;
      batch.token_ids.insert(batch.token_ids.end(), ids.begin() + begin, ids.begin() + end);
      batch.runs.push_back({slot, begin, end - begin, true});
    }
    const at::Tensor logits = forward_->Step(batch);
    for (size_t i = 0; i < pieces.size(); ++i) {
      const std::vector<int64_t>& ids = pieces[i][0] == 2 ? first : second;
      const at::Tensor expected = Expected({ids.begin(), ids.begin() + pieces[i][2]});
      EXPECT_LT(MaxDifference(logits[static_cast<int64_t>(i)], expected), GetParam().tolerance) << "to " << pieces[i][2];
    }
  };
  step({{2, 0, 50}, {1, 0, 3}});
  step({{2, 50, 55}, {1, 3, 20}});
  step({{1, 20, 60}, {2, 55, 56}});
  for (int64_t i = 0; i < 10; ++i) step({{1, 60 + i, 61 + i}, {2, 56 + i, 57 + i}});
}

TEST_P(ForwardTest, ACopiedPrefixIsTheSame) {
  std::vector<int64_t> ids = Ids(41, 3);
  forward_->Reserve(2, 64);
  forward_->Step({ids, {{.slot = 0, .start = 0, .count = 41}}});
  forward_->CopyPrefix(0, 1, 37);
  std::copy_n(Ids(4, 50).begin(), 4, ids.begin() + 37);
  const at::Tensor logits = forward_->Step({{ids.begin() + 37, ids.end()}, {{.slot = 1, .start = 37, .count = 4, .wants_logits = true}}});
  EXPECT_LT(MaxDifference(logits[0], Expected(ids)), GetParam().tolerance);
}

TEST(ForwardTest, RunsBeyondTheCacheAreRefused) {
  const auto tiny = TinyModel(TinyVectors("llama"), at::kFloat);
  for (const auto& forward : {MakeCpuForward(tiny), MakeAtenForward(tiny)}) {
    forward->Reserve(1, 64);
    EXPECT_THROW(forward->Step({{1}, {{.slot = 1, .start = 0, .count = 1}}}), c10::Error);
    EXPECT_THROW(forward->Step({{1}, {{.slot = 0, .start = 64, .count = 1}}}), c10::Error);
  }
}

// Goal: the product for few rows, for every tile shape and odd sizes.  Oracle: float64.
TEST(ProductTest, EqualsFloat64) {
  at::manual_seed(4);
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
    for (int64_t rows : {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 17, 33}) {
      for (const auto& [outputs, inputs] : {std::pair<int64_t, int64_t>{61, 32}, {50, 45}, {130, 576}}) {
        const at::Tensor x = at::randn({rows, inputs}).to(dtype), weight = at::randn({outputs, inputs}).to(dtype);
        const at::Tensor bias = at::randn({outputs}).to(dtype), y = at::ones({rows, outputs + 3});
        const at::Tensor want = at::linear(x.to(at::kDouble), weight.to(at::kDouble), bias.to(at::kDouble));
        const auto run = [&](auto type, bool accumulate, int64_t begin, int64_t end) {
          using T = decltype(type);
          kernels::Product<T>({static_cast<T*>(x.data_ptr()), rows, inputs, static_cast<T*>(weight.data_ptr()),
                               static_cast<T*>(bias.data_ptr()), y.data_ptr<float>(), outputs + 3, accumulate},
                              begin, end);
        };
        for (const bool accumulate : {false, true}) {
          for (const auto& [begin, end] : {std::pair<int64_t, int64_t>{0, 16}, {16, outputs}}) {
            dtype == at::kFloat ? run(float{}, accumulate, begin, end) : run(simd::Bf16{}, accumulate, begin, end);
          }
          if (rows == 0) continue;
          EXPECT_LT(MaxDifference(y.narrow(1, 0, outputs), want * (accumulate ? 2 : 1)), 2e-4) << rows << " " << outputs;
        }
        EXPECT_TRUE(y.narrow(1, outputs, 3).eq(1).all().item<bool>());
      }
    }
  }
}

// Goal: the same prompt gives the same bits every time, however the threads meet: the border between their tokens falls within a
// pair of positions for every odd half of a length.  Oracle: the first of many runs.
TEST(ForwardRepeatTest, ThreadsDoNotRaceForPairs) {
  const int threads = at::get_num_threads();
  at::set_num_threads(4);
  const auto model = TinyModel(TinyVectors("llama"), at::kBFloat16);
  for (int64_t length : {14, 27, 50, 70}) {
    at::Tensor first;
    for (int repeat = 0; repeat < 60; ++repeat) {
      const c10::InferenceMode inference;
      const std::unique_ptr<Forward> forward = MakeCpuForward(model);
      forward->Reserve(1, 100);
      StepBatch batch{.token_ids = Ids(length, 5), .runs = {{.slot = 0, .start = 0, .count = length, .wants_logits = true}}};
      const at::Tensor logits = forward->Step(batch);
      if (repeat == 0) first = logits;
      ASSERT_TRUE(at::equal(logits, first)) << length << " tokens, repeat " << repeat;
    }
  }
  at::set_num_threads(threads);
}

// Goal: no member passes a barrier early, over many barriers and runs.
TEST(TeamTest, BarriersHold) {
  for (int size : {1, 2, 5}) {
    Team team(size);
    std::atomic<int> arrivals{0};
    std::atomic<bool> early{false};
    for (int run = 0; run < 20; ++run) {
      arrivals = 0;
      team.Run([&](int) {
        for (int round = 1; round <= 50; ++round) {
          ++arrivals;
          team.Barrier();
          if (arrivals < round * size) early = true;
          team.Barrier();
        }
      });
      EXPECT_EQ(arrivals, 50 * size);
    }
    EXPECT_FALSE(early);
  }
}

TEST(TeamTest, SharesCoverEverythingOnce) {
  for (int64_t total : {0, 1, 15, 16, 61, 960}) {
    for (int size : {1, 2, 3, 7}) {
      int64_t next = 0;
      for (int member = 0; member < size; ++member) {
        const Share share = ShareOf(total, member, size, 16);
        EXPECT_EQ(share.begin, next);
        next = share.end;
      }
      EXPECT_EQ(next, total);
    }
  }
}

}  // namespace
}  // namespace refinery::generate
