#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <gtest/gtest.h>

#include "worker/task/model/packed_weight.h"

namespace refinery::model {
namespace {

using checkpoint::GptqFormat;
using checkpoint::GptqTensors;

// GPTQ tensors of random codes, their zero points and scales, packed here bit by bit.
struct Quantized {
  GptqTensors tensors;
  GptqFormat format;
  at::Tensor weight;  // [out, in] float32 = scale * (code - zero)
};

Quantized Random(int64_t bits, int64_t group_size, int64_t in, int64_t out, bool symmetric) {
  at::manual_seed(static_cast<uint64_t>(bits * 1000 + in));
  const int64_t group = group_size > 0 ? group_size : in, groups = (in + group - 1) / group, top = int64_t{1} << bits;
  const at::Tensor codes = at::randint(top, {in, out}, at::kLong);
  const at::Tensor zeros = symmetric ? at::full({groups, out}, top / 2, at::kLong) : at::randint(1, top, {groups, out}, at::kLong);
  const at::Tensor scales = at::rand({groups, out}).add_(0.1).to(at::kHalf);
  // A stream of fields of `bits` bits along dimension 0, least significant first.
  const auto pack = [&](const at::Tensor& fields) {
    const at::Tensor words = at::zeros({fields.size(0) * bits / 32, fields.size(1)}, at::kInt);
    const auto from = fields.accessor<int64_t, 2>();
    auto to = words.accessor<int32_t, 2>();
    for (int64_t i = 0; i < fields.size(0); ++i) {
      for (int64_t o = 0; o < fields.size(1); ++o) {
        for (int64_t b = 0; b < bits; ++b) {
          const int64_t place = i * bits + b;
          to[place / 32][o] |= static_cast<int32_t>(static_cast<uint32_t>((from[i][o] >> b) & 1) << (place % 32));
        }
      }
    }
    return words;
  };
  Quantized q;
  q.format = {.bits = bits, .group_size = group_size, .zeros_minus_one = false};
  q.tensors = {pack(codes), pack(zeros.t().contiguous()).t().contiguous(), scales, {}};
  const at::Tensor group_of = at::arange(in).floor_divide(group).to(at::kLong);
  q.weight = ((codes - zeros.index_select(0, group_of)).to(at::kFloat) * scales.to(at::kFloat).index_select(0, group_of)).t();
  return q;
}

// Goal: what is packed expands to the very weight.  Oracle: scale * (code - zero), computed apart.
TEST(PackedWeightTest, ExpandsToTheWeight) {
  for (const int64_t bits : {2, 3, 4, 8}) {
    for (const int64_t group : {-1, 32, 64, 96, 128}) {
      for (const int64_t in : {64, 96, 192, 288}) {
        for (const bool symmetric : {true, false}) {
          const Quantized q = Random(bits, group, in, 32, symmetric);
          ASSERT_TRUE(PackedWeight::Takes(q.tensors, q.format));
          WeightArena arena;
          const auto made = PackedWeight::Pack(q.tensors, q.format, arena);
          ASSERT_TRUE(made.ok()) << made.status();
          const std::shared_ptr<const PackedWeight> packed = *made;
          EXPECT_TRUE(at::equal(packed->Expand(at::kFloat), q.weight)) << bits << " bit, group " << group << ", " << in << " inputs";
          EXPECT_EQ(packed->offsets.defined(), !symmetric);
        }
      }
    }
  }
}

TEST(PackedWeightTest, LeavesOtherFormsToTheExpandedWeight) {
  Quantized q = Random(4, 16, 64, 32, true);
  EXPECT_FALSE(PackedWeight::Takes(q.tensors, q.format)) << "groups of 16";
  q = Random(4, 32, 64, 32, true);
  q.tensors.g_idx = at::arange(64, at::kInt).floor_divide(32);
  EXPECT_TRUE(PackedWeight::Takes(q.tensors, q.format)) << "g_idx in order";
  q.tensors.g_idx = q.tensors.g_idx.flip(0);
  EXPECT_FALSE(PackedWeight::Takes(q.tensors, q.format)) << "inputs in the order of their activations";
}

}  // namespace
}  // namespace refinery::model
