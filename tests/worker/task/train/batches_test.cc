#include "worker/task/runtime/torch.h"

#include "worker/task/train/batches.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <set>

#include "tests/worker/task/train/fixture.h"

namespace refinery::train {
namespace {

using ::testing::ElementsAre;

std::vector<int64_t> List(const at::Tensor& tensor) {
  return {tensor.data_ptr<int64_t>(), tensor.data_ptr<int64_t>() + tensor.numel()};
}

// Goal: every example once per epoch, within the budget. Method: count over many steps.
TEST(ExampleStreamTest, VisitsEveryExampleOncePerEpoch) {
  std::vector<int64_t> lengths;
  for (int64_t i = 0; i < 37; ++i) lengths.push_back(5 + i % 9);
  ExampleStream stream(lengths, 3);
  std::vector<size_t> seen;
  while (seen.size() < 3 * lengths.size()) {
    const std::vector<size_t> step = stream.Next(30);
    ASSERT_FALSE(step.empty());
    int64_t tokens = 0;
    for (const size_t example : step) tokens += lengths[example];
    EXPECT_LE(tokens, 30);
    EXPECT_GT(tokens, 30 - 13);  // the longest would not have fitted
    seen.insert(seen.end(), step.begin(), step.end());
  }
  std::set<std::vector<size_t>> orders;
  for (size_t epoch = 0; epoch < 3; ++epoch) {
    const auto begin = seen.begin() + static_cast<std::ptrdiff_t>(epoch * lengths.size());
    const std::vector<size_t> order(begin, begin + static_cast<std::ptrdiff_t>(lengths.size()));
    EXPECT_EQ(std::set<size_t>(order.begin(), order.end()).size(), lengths.size());
    orders.insert(order);
  }
  EXPECT_EQ(orders.size(), 3u) << "epochs repeat their order";
}

TEST(ExampleStreamTest, ContinuesFromACursor) {
  ExampleStream stream({4, 5, 6, 7, 8, 9, 10}, 11);
  for (int i = 0; i < 5; ++i) (void)stream.Next(12);
  ExampleStream other({4, 5, 6, 7, 8, 9, 10}, 11);
  other.Seek(stream.cursor());
  for (int i = 0; i < 10; ++i) EXPECT_EQ(other.Next(12), stream.Next(12));
}

TEST(ExampleStreamTest, AnExampleBeyondTheBudgetIsAStepOfItsOwn) {
  ExampleStream stream({100}, 1);
  EXPECT_THAT(stream.Next(10), ElementsAre(0));
  EXPECT_THAT(stream.Next(10), ElementsAre(0));
}

TEST(SplitByTokensTest, KeepsOrderAndBudget) {
  std::vector<data::EncodedExample> all(4);
  for (size_t i = 0; i < 4; ++i) all[i].tokens.resize(10 * (i + 1));
  EXPECT_THAT(SplitByTokens({3, 0, 1, 2}, all, 40), ElementsAre(ElementsAre(3), ElementsAre(0, 1), ElementsAre(2)));
  EXPECT_THAT(SplitByTokens({3, 0, 1, 2}, all, 0), ElementsAre(ElementsAre(3, 0, 1, 2)));
}

// Goal: logit t predicts token t+1, within each sequence. Method: written out by hand.
TEST(MakeBatchTest, PredictsEachAnswerTokenFromTheOneBefore) {
  const std::vector<data::EncodedExample> all = {{.tokens = {10, 11, 12, 13}, .answer_begin = 2},
                                                 {.tokens = {20, 21}, .answer_begin = 1},
                                                 {.tokens = {30, 31, 32}, .answer_begin = 1}};
  const TrainBatch batch = MakeBatch({2, 0}, all, {}, at::kCPU);
  EXPECT_THAT(batch.packed.lengths, ElementsAre(3, 4));
  EXPECT_THAT(List(batch.packed.token_ids), ElementsAre(30, 31, 32, 10, 11, 12, 13));
  EXPECT_THAT(List(batch.positions), ElementsAre(0, 1, 4, 5));
  EXPECT_THAT(List(batch.targets), ElementsAre(31, 32, 12, 13));
  EXPECT_FALSE(batch.teacher.ids.defined());
  EXPECT_EQ(AnswerTokens({2, 0}, all), 4);
}

}  // namespace
}  // namespace refinery::train
