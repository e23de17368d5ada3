#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <gtest/gtest.h>

#include "worker/task/generate/aligned.h"
#include "worker/task/generate/cpu_product.h"
#include "worker/task/generate/packed_product.h"
#include "worker/task/model/pair_attention.h"
#include "worker/task/model/packed_weight.h"

namespace refinery::generate {
namespace {

using kernels::PairAttentionItem;
using simd::Bf16;

template <typename T = Bf16>
T* Data(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

double MaxDifference(const at::Tensor& a, const at::Tensor& b) {
  return (a.to(at::kDouble) - b.to(at::kDouble)).abs().max().item<double>();
}

// Goal: y = x W^T + b for every number of rows and odd sizes, and a row's bits do not depend on the others.
// Oracle: the product in float64.
TEST(KernelsTest, ProductOfPairs) {
  for (const int64_t inputs : {31, 32, 96, 100, 576}) {
    at::manual_seed(5);
    const int64_t outputs = 45;
    const at::Tensor weight = at::randn({outputs, inputs}).to(at::kBFloat16), bias = at::randn({outputs}).to(at::kBFloat16);
    const at::Tensor x = at::randn({19, inputs}).to(at::kBFloat16);
    const at::Tensor expected = at::linear(x.to(at::kDouble), weight.to(at::kDouble), bias.to(at::kDouble));
    at::Tensor alone;
    for (int64_t rows = 1; rows <= 19; ++rows) {
      const at::Tensor y = at::full({rows, outputs}, 7.0f);
      kernels::Product<Bf16>({Data(x), rows, inputs, Data(weight), Data(bias), Data<float>(y), outputs, true}, 0, outputs);
      EXPECT_LT(MaxDifference(y - 7.0f, expected.narrow(0, 0, rows)), 2e-5 * std::sqrt(inputs)) << rows << " rows, " << inputs;
      if (rows == 1) alone = y;
      EXPECT_TRUE(at::equal(y[0], alone[0])) << rows << " rows, " << inputs << " inputs";
    }
  }
}

std::shared_ptr<model::PackedWeight> RandomPacked(int64_t bits, int64_t group, int64_t inputs, int64_t outputs, bool symmetric) {
  auto packed = std::make_shared<model::PackedWeight>();
  packed->outputs = outputs;
  packed->inputs = inputs;
  packed->group_size = group;
  packed->bits = bits;
  packed->codes = at::randint(256, {outputs, packed->chunks() * packed->planes() * 32}, at::kByte);
  if (bits < 4) packed->codes = packed->codes.bitwise_and(bits == 2 ? 0x33 : 0x77);
  packed->scales = at::rand({outputs, packed->groups()}).add_(0.1).mul_(0.1).to(at::kHalf);
  if (!symmetric) packed->offsets = at::randint(-3, 4, {outputs, packed->groups()}, at::kFloat);
  return packed;
}

// Goal: products with packed weights of all forms and numbers of rows; a row's bits do not depend on the others.
// Oracle: the expanded weight (tested apart) in float64.
TEST(KernelsTest, PackedProduct) {
  for (const int64_t bits : {2, 3, 4, 8}) {
    for (const int64_t group : {32, 64, 96, 128, 1024}) {
      for (const int64_t inputs : {32, 64, 100, 288, 576}) {
        for (const bool symmetric : {true, false}) {
          at::manual_seed(static_cast<uint64_t>(bits + group + inputs));
          const int64_t outputs = 37, most = 7;
          const auto packed = RandomPacked(bits, group, inputs, outputs, symmetric);
          const at::Tensor x = at::randn({most, inputs}).to(at::kBFloat16), bias = at::randn({outputs}).to(at::kBFloat16);
          const at::Tensor weight = packed->Expand(at::kFloat).to(at::kDouble);
          const at::Tensor expected = at::linear(x.to(at::kDouble), weight, bias.to(at::kDouble));
          const kernels::PackedMatrix matrix{Data<uint8_t>(packed->codes), Data<uint16_t>(packed->scales),
                                             symmetric ? nullptr : Data<float>(packed->offsets), inputs, group,
                                             static_cast<int>(packed->planes()), static_cast<int>(bits)};
          at::Tensor alone;
          for (int64_t rows = 1; rows <= most; ++rows) {
            const at::Tensor y = at::zeros({rows, outputs});
            kernels::PackedProduct({Data(x), rows, matrix, Data(bias), Data<float>(y), outputs, false}, 0, outputs);
            const double size = expected.abs().max().item<double>();
            EXPECT_LT(MaxDifference(y, expected.narrow(0, 0, rows)), 3e-5 * size)
                << bits << " bit, group " << group << ", " << inputs << " inputs, " << rows << " rows";
            if (rows == 1) alone = y;
            EXPECT_TRUE(at::equal(y[0], alone[0])) << rows << " rows";
          }
        }
      }
    }
  }
}

// Goal: attention of one to six queries at any positions, with and without a window.
// Oracle: softmax(q K^T) V in float64 on the same bfloat16 queries, keys and values; the weights are rounded to 8 bits.
TEST(KernelsTest, PairAttention) {
  if (!kernels::PairAttentionWorks(64)) GTEST_SKIP() << "this CPU has no AVX512_BF16";
  for (const int64_t d : {16, 64, 80, 128}) {
    at::manual_seed(static_cast<uint64_t>(d));
    const int64_t capacity = 128, length = 117;
    const at::Tensor keys = at::randn({length, d}).to(at::kBFloat16).to(at::kFloat), queries = at::randn({6, d}).to(at::kBFloat16).to(at::kFloat);
    const at::Tensor values = at::randn({length, d}).to(at::kBFloat16).to(at::kFloat);
    // What no token has written is not a number.
    const at::Tensor key_cache = at::full({capacity, d}, NAN, at::kBFloat16), value_cache = at::full({capacity, d}, NAN, at::kBFloat16);
    for (int64_t t = 0; t < length; ++t) {
      kernels::WritePairKey(Data<float>(keys[t]), Data(key_cache), t, d);
      kernels::WritePairValue(Data<float>(values[t]), Data(value_cache), t, d);
    }
    for (int count = 1; count <= 6; ++count) {
      for (const int64_t window : {int64_t{0}, int64_t{21}}) {
        const at::Tensor out = at::zeros({6, d}, at::kBFloat16);
        AlignedVector<float> scratch(static_cast<size_t>(kernels::PairScratchFloats(length, d)));
        PairAttentionItem item{.count = count, .keys = Data(key_cache), .values = Data(value_cache), .scratch = scratch.data(),
                               .head_dim = d, .scale = 1.0f / std::sqrt(static_cast<float>(d))};
        for (int r = 0; r < count; ++r) {
          const int64_t last = length - 1 - 19 * r;
          item.queries[r] = {Data<float>(queries[r]), Data(out[r]), window > 0 ? last - window + 1 : 0, last};
        }
        kernels::AttendPairs(item);
        for (int r = 0; r < count; ++r) {
          const int64_t first = item.queries[r].first, seen = item.queries[r].last - first + 1;
          const at::Tensor scores = at::mv(keys.narrow(0, first, seen).to(at::kDouble), queries[r].to(at::kDouble)) / std::sqrt(d);
          const at::Tensor expected = at::mv(values.narrow(0, first, seen).to(at::kDouble).t(), at::softmax(scores, 0));
          EXPECT_LT(MaxDifference(out[r], expected), 0.02) << "d " << d << ", query " << r << " of " << count << ", window " << window;
          // Alone it has the same bits.
          const at::Tensor lone = at::zeros({d}, at::kBFloat16);
          PairAttentionItem one = item;
          one.count = 1;
          one.queries[0] = item.queries[r];
          one.queries[0].out = Data(lone);
          kernels::AttendPairs(one);
          EXPECT_TRUE(at::equal(lone, out[r])) << "query " << r << " of " << count;
        }
      }
    }
  }
}

}  // namespace
}  // namespace refinery::generate
