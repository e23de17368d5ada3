#include "worker/task/runtime/torch.h"

#include "worker/task/distill/logit_cache.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <nlohmann/json.hpp>

#include "common/digest.h"
#include "common/files.h"
#include "tests/support/status_matchers.h"
#include "tests/support/vectors.h"
#include "worker/task/distill/tail_grid.h"

namespace refinery::distill {
namespace {

using ::refinery::testing::IsOk;
using ::refinery::testing::MaxDifference;
using ::refinery::testing::StatusIs;
using ::testing::HasSubstr;

constexpr int64_t kVocabulary = 50;
constexpr int64_t kTopK = 8;

class LogitCacheTest : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = std::filesystem::path(::testing::TempDir()) /
              ::testing::UnitTest::GetInstance()->current_test_info()->name();
    std::filesystem::remove_all(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  static at::Tensor Logits(int64_t rows, uint64_t seed) {
    return 4 * at::randn({rows, kVocabulary}, at::detail::createCPUGenerator(seed), at::TensorOptions(at::kFloat));
  }

  void WriteTwo() {
    LogitCacheWriter writer({.teacher_digest = "sha256:aa", .tokenizer_digest = "sha256:bb", .vocab_size = kVocabulary,
                             .top_k = kTopK});
    writer.Add("second", Logits(5, 2));
    writer.Add("first", Logits(3, 1));
    ASSERT_THAT(writer.Write(folder_), IsOk());
  }

  nlohmann::json Index() const { return nlohmann::json::parse(*ReadFile(folder_ / "index.json")); }
  void SetIndex(const nlohmann::json& index) const {
    ASSERT_THAT(WriteFileAtomically(folder_ / "index.json", index.dump()), IsOk());
  }

  std::filesystem::path folder_;
};

// Goal: what was put in comes out. Method: log-softmax, sort and tail in float64 over the dense logits.
TEST_F(LogitCacheTest, ReturnsTheTeachersDistribution) {
  WriteTwo();
  const auto cache = LogitCache::Open(folder_);
  ASSERT_THAT(cache, IsOk());
  EXPECT_EQ((*cache)->size(), 2u);
  EXPECT_EQ((*cache)->info().teacher_digest, "sha256:aa");
  EXPECT_EQ((*cache)->info().tokenizer_digest, "sha256:bb");
  EXPECT_EQ((*cache)->info().vocab_size, kVocabulary);
  EXPECT_EQ((*cache)->info().top_k, kTopK);
  for (const auto& [key, logits] : {std::pair("first", Logits(3, 1)), std::pair("second", Logits(5, 2))}) {
    const auto rows = (*cache)->Get(key);
    ASSERT_THAT(rows, IsOk());
    const auto [sorted, order] = logits.to(at::kDouble).log_softmax(1).sort(1, /*descending=*/true);
    EXPECT_TRUE(at::equal(rows->ids.to(at::kLong), order.narrow(1, 0, kTopK)));
    EXPECT_LT(MaxDifference(rows->logits, sorted.narrow(1, 0, kTopK)), 1e-5);
    const at::Tensor tail = sorted.narrow(1, kTopK, kVocabulary - kTopK).exp().sum(1).log();
    EXPECT_LT(MaxDifference(rows->tail_logits, tail), 1e-5);
    for (size_t g = 0; g < kInverseTemperatures.size(); ++g) {
      const at::Tensor tempered = sorted.narrow(1, kTopK, kVocabulary - kTopK) * kInverseTemperatures[g];
      EXPECT_LT(MaxDifference(rows->tail_log_partitions.select(1, static_cast<int64_t>(g)), tempered.logsumexp({1})),
                1e-5);
    }
  }
}

TEST_F(LogitCacheTest, SaysWhichExampleIsMissing) {
  WriteTwo();
  const auto cache = LogitCache::Open(folder_);
  ASSERT_THAT(cache, IsOk());
  EXPECT_THAT((*cache)->Get("third"), StatusIs(absl::StatusCode::kNotFound, HasSubstr("third")));
}

TEST_F(LogitCacheTest, SameRowsGiveTheSameBytes) {
  WriteTwo();
  const auto first = ListFolder(folder_);
  std::filesystem::remove_all(folder_);
  WriteTwo();
  const auto second = ListFolder(folder_);
  ASSERT_THAT(first, IsOk());
  ASSERT_THAT(second, IsOk());
  EXPECT_EQ(ManifestText(*first), ManifestText(*second));
}

// Goal: no damaged file is read. Method: flip one byte of the tensors.
TEST_F(LogitCacheTest, RefusesADamagedFile) {
  WriteTwo();
  std::string bytes = *ReadFile(folder_ / "logits.safetensors");
  bytes[bytes.size() - 3] ^= 1;
  ASSERT_THAT(WriteFileAtomically(folder_ / "logits.safetensors", bytes), IsOk());
  EXPECT_THAT(LogitCache::Open(folder_), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("logits.safetensors")));
}

// Goal: an index that does not fit is refused, whatever it claims. Method: one wrong field each.
TEST_F(LogitCacheTest, RefusesAnIndexThatDoesNotFit) {
  WriteTwo();
  const nlohmann::json good = Index();
  const auto refused = [&](const char* pointer, const nlohmann::json& value, const char* message) {
    nlohmann::json index = good;
    index[nlohmann::json::json_pointer(pointer)] = value;
    SetIndex(index);
    EXPECT_THAT(LogitCache::Open(folder_), StatusIs(absl::StatusCode::kDataLoss, HasSubstr(message))) << pointer;
  };
  refused("/version", 1, "version 1, wanted 'refinery.logit_cache' version 2; make the logit cache again");
  refused("/version", 3, "version 3");
  refused("/inverse_temperatures", nullptr, "'inverse_temperatures'");
  refused("/inverse_temperatures/3", 1.3, "'inverse_temperatures'");
  refused("/format", "other", "'other'");
  refused("/top_k", 9, "'ids'");
  refused("/top_k", 0, "top_k");
  refused("/tokens", 9, "'ids'");
  refused("/tokens", "8", "'tokens'");
  refused("/vocab_size", 20, "outside the vocabulary");
  refused("/rows/1/end", 9, "[3, 9) of 8");
  refused("/rows/1/begin", -1, "'begin'");
  refused("/rows/1/key", "first", "twice");
  refused("/rows", nullptr, "'rows'");
  ASSERT_THAT(WriteFileAtomically(folder_ / "index.json", "{"), IsOk());
  EXPECT_THAT(LogitCache::Open(folder_), StatusIs(absl::StatusCode::kDataLoss, HasSubstr("index.json")));
  SetIndex(good);
  EXPECT_THAT(LogitCache::Open(folder_), IsOk());
}

TEST_F(LogitCacheTest, NamesAMissingFile) {
  EXPECT_THAT(LogitCache::Open(folder_), StatusIs(absl::StatusCode::kNotFound, HasSubstr("index.json")));
}

TEST_F(LogitCacheTest, KeepsTheWholeVocabularyWhenTopKCoversIt) {
  LogitCacheWriter writer({.vocab_size = kVocabulary, .top_k = 1000});
  writer.Add("a", Logits(2, 1));
  ASSERT_THAT(writer.Write(folder_), IsOk());
  const auto cache = LogitCache::Open(folder_);
  ASSERT_THAT(cache, IsOk());
  EXPECT_EQ((*cache)->info().top_k, kVocabulary);
  const auto rows = (*cache)->Get("a");
  ASSERT_THAT(rows, IsOk());
  EXPECT_TRUE(at::isneginf(rows->tail_logits).all().item<bool>());
  EXPECT_TRUE(at::isneginf(TailAtTemperature(rows->tail_logits, rows->tail_log_partitions, 1.5)).all().item<bool>());
  EXPECT_NEAR(rows->logits.exp().sum().item<double>(), 2, 1e-5);
}

}  // namespace
}  // namespace refinery::distill
