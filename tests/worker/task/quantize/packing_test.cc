#include "worker/task/runtime/torch.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "common/files.h"
#include "worker/task/quantize/gptq.h"

namespace refinery::quantize {
namespace {

at::Tensor Matrix(const nlohmann::json& rows, at::ScalarType type) {
  std::vector<at::Tensor> stacked;
  for (const auto& row : rows) stacked.push_back(at::tensor(row.get<std::vector<int64_t>>(), at::kLong).to(type));
  return at::stack(stacked);
}

at::Tensor HalfMatrix(const nlohmann::json& bit_rows) {
  return Matrix(bit_rows, at::kInt).to(at::kShort).view(at::kHalf);
}

class PackingTest : public ::testing::TestWithParam<int> {
 protected:
  static nlohmann::json Vectors() {
    const std::string path =
        std::string(REFINERY_SOURCE_DIR "/tests/vectors/quantize/gptq_v1_") + std::to_string(GetParam()) + "bit.json";
    return nlohmann::json::parse(ReadFile(path).value());
  }
  static QuantizedLinear Linear(const nlohmann::json& vectors) {
    return {.codes = Matrix(vectors["codes"], at::kByte), .scales = HalfMatrix(vectors["scales_bits"]),
            .bits = vectors["bits"], .group_size = vectors["group_size"]};
  }
};

// Goal: every stored word is that of the GPTQ v1 layout.  Method: words written by an independent packer (make_vectors.py).
TEST_P(PackingTest, WordsAreThoseOfTheLayout) {
  const nlohmann::json vectors = Vectors();
  const PackedGptq packed = PackGptqV1(Linear(vectors));
  EXPECT_TRUE(at::equal(packed.qweight, Matrix(vectors["qweight"], at::kInt)));
  EXPECT_TRUE(at::equal(packed.qzeros, Matrix(vectors["qzeros"], at::kInt)));
  EXPECT_TRUE(at::equal(packed.scales, HalfMatrix(vectors["scales_packed_bits"])));
  EXPECT_TRUE(at::equal(packed.g_idx, at::tensor(vectors["g_idx"].get<std::vector<int>>(), at::kInt)));
  EXPECT_EQ(packed.qweight.scalar_type(), at::kInt);
  EXPECT_EQ(packed.scales.scalar_type(), at::kHalf);
}

TEST_P(PackingTest, UnpackingGivesTheCodesBack) {
  const nlohmann::json vectors = Vectors();
  const PackedGptq packed{.qweight = Matrix(vectors["qweight"], at::kInt), .qzeros = Matrix(vectors["qzeros"], at::kInt),
                          .scales = HalfMatrix(vectors["scales_packed_bits"]),
                          .g_idx = at::tensor(vectors["g_idx"].get<std::vector<int>>(), at::kInt)};
  const QuantizedLinear linear = UnpackGptqV1(packed, vectors["bits"], vectors["group_size"]);
  EXPECT_TRUE(at::equal(linear.codes, Matrix(vectors["codes"], at::kByte)));
  EXPECT_TRUE(at::equal(linear.scales, HalfMatrix(vectors["scales_bits"])));
}

INSTANTIATE_TEST_SUITE_P(AllWidths, PackingTest, ::testing::Values(2, 3, 4, 8));

// A ragged last group and one group for the whole row survive the way through the packed form.
TEST(PackingTest, RaggedAndWholeRowGroupsRoundTrip) {
  at::manual_seed(1);
  const at::Tensor weight = at::randn({32, 96});
  for (const int64_t group_size : {64, -1}) {
    const QuantizedLinear linear = RoundToNearest(weight, {.bits = 3, .group_size = group_size});
    EXPECT_EQ(linear.scales.size(1), group_size == 64 ? 2 : 1);
    const QuantizedLinear back = UnpackGptqV1(PackGptqV1(linear), 3, group_size);
    EXPECT_TRUE(at::equal(back.codes, linear.codes));
    EXPECT_TRUE(at::equal(back.Dequantize(), linear.Dequantize()));
  }
}

// Zero points of each group's own and a permuted g_idx, in both versions, whole and ragged groups.
TEST(PackingTest, AsymmetricAndActOrderLayersRoundTrip) {
  at::manual_seed(2);
  const at::Tensor inputs = at::randn({300, 96}) * at::exp(at::randn({96}));
  for (const int64_t bits : {2, 3, 4, 8}) {
    for (const int64_t group_size : {16, 32, 64, -1}) {
      const QuantizedLinear linear = Gptq("layer", at::randn({64, 96}), at::mm(inputs.t(), inputs),
                                          {.bits = bits, .group_size = group_size, .grid = Grid::kAsymmetric,
                                           .order = ColumnOrderKind::kClassic}, nullptr);
      for (const int64_t version : {1, 2}) {
        const PackedGptq packed = version == 1 ? PackGptqV1(linear) : PackGptqV2(linear);
        const PackedLayout layout{.bits = bits, .group_size = group_size, .version = version, .symmetric = false, .natural_groups = false};
        const QuantizedLinear back = UnpackGptq(packed, layout);
        EXPECT_TRUE(at::equal(back.codes, linear.codes) && at::equal(back.zeros, linear.zeros));
        EXPECT_TRUE(at::equal(back.group_index, linear.group_index));
        EXPECT_TRUE(at::equal(back.Dequantize(), linear.Dequantize()));
        PackedGptq broken = packed;
        broken.g_idx = packed.g_idx + 1;
        EXPECT_NE(PackedProblem(broken, layout), "");
      }
    }
  }
  QuantizedLinear zero = RoundToNearest(at::randn({32, 64}), {.bits = 4, .group_size = 32, .grid = Grid::kAsymmetric});
  zero.zeros.select(0, 3).zero_();
  EXPECT_THROW(PackGptqV1(zero), c10::Error);
  EXPECT_TRUE(at::equal(UnpackGptq(PackGptqV2(zero), {.bits = 4, .group_size = 32, .version = 2, .symmetric = false}).zeros, zero.zeros));
}

TEST(PackingTest, RefusesWhatIsNotSymmetricOrNotInOrder) {
  const QuantizedLinear linear = RoundToNearest(at::randn({32, 64}), {.bits = 4, .group_size = 32});
  PackedGptq packed = PackGptqV1(linear);
  packed.qzeros = packed.qzeros + 1;
  EXPECT_THROW(UnpackGptqV1(packed, 4, 32), c10::Error);
  packed = PackGptqV1(linear);
  packed.g_idx = packed.g_idx.flip(0);
  EXPECT_THROW(UnpackGptqV1(packed, 4, 32), c10::Error);
  EXPECT_THROW(PackGptqV1(RoundToNearest(at::randn({30, 64}), {})), c10::Error);
}

}  // namespace
}  // namespace refinery::quantize
