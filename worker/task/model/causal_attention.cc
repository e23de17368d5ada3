#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <atomic>
#include <bit>

#include "worker/task/model/causal_attention.h"
#include "worker/task/model/pair_attention.h"

namespace refinery::model {
namespace {

using simd::Bf16;

constexpr int64_t kBlock = 16;       // positions of a key block
constexpr int64_t kTurnTokens = 64;  // a thread takes so many queries of a sequence at a time

struct Sequence {
  int64_t begin = 0, length = 0;  // tokens
  int64_t place = 0;              // of its first position in the cache, a multiple of kBlock
};

// One call: the sequences' keys and values in the layout of pair_attention.h, one cache after the other.
class Pass {
 public:
  // qkv and `rotated`, its queries and keys after the rotary embedding, must outlive the pass.
  Pass(const at::Tensor& qkv, const at::Tensor& rotated, const std::vector<int64_t>& lengths, const AttentionShape& shape)
      : qkv_(static_cast<const Bf16*>(qkv.const_data_ptr())), rotated_(static_cast<const Bf16*>(rotated.const_data_ptr())), n_(shape.heads), m_(shape.kv_heads), d_(shape.head_dim), window_(shape.sliding_window) {
    int64_t begin = 0;
    for (const int64_t length : lengths) {
      if (length > 0) sequences_.push_back({.begin = begin, .length = length, .place = places_});
      begin += length;
      places_ += (length + kBlock - 1) / kBlock * kBlock;
      longest_ = std::max(longest_, length);
    }
    keys_ = at::empty({m_ * places_ * d_}, qkv.options());
    values_ = at::empty({m_ * places_ * d_}, qkv.options());
    out_ = at::empty({qkv.size(0), n_ * d_}, qkv.options());
  }

  at::Tensor Run() {
    at::parallel_for(0, m_ * static_cast<int64_t>(sequences_.size()), 1, [this](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) WriteCache(sequences_[static_cast<size_t>(i / m_)], i % m_);
    });
    struct Turn {
      const Sequence* sequence;
      int64_t head, token;
    };
    std::vector<Turn> turns;
    for (const Sequence& sequence : sequences_) {
      for (int64_t token = 0; token < sequence.length; token += kTurnTokens) {
        for (int64_t head = 0; head < m_; ++head) turns.push_back({&sequence, head, token});
      }
    }
    std::atomic<size_t> next{0};  // later tokens see more: threads take what comes next
    at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
      const at::Tensor scratch = at::empty({kernels::PairScratchFloats(longest_, d_) + kernels::kPairQueries * d_}, at::kFloat);
      for (size_t i = next.fetch_add(1); i < turns.size(); i = next.fetch_add(1)) {
        Attend(*turns[i].sequence, turns[i].head, turns[i].token, scratch.data_ptr<float>());
      }
    });
    return out_;
  }

 private:
  Bf16* Cache(const at::Tensor& cache, const Sequence& sequence, int64_t head) const {
    return static_cast<Bf16*>(cache.data_ptr()) + (head * places_ + sequence.place) * d_;
  }
  // A head's row: of queries and keys as the rotary embedding left them, of values as they came.
  const Bf16* Rotated(int64_t token, int64_t head) const { return rotated_ + (token * (n_ + m_) + head) * d_; }
  const Bf16* Value(int64_t token, int64_t head) const { return qkv_ + (token * (n_ + 2 * m_) + n_ + m_ + head) * d_; }
  void Widen(const Bf16* row, float* to) const {
    for (int64_t j = 0; j < d_; ++j) to[j] = std::bit_cast<float>(static_cast<uint32_t>(row[j].bits) << 16);
  }

  void WriteCache(const Sequence& sequence, int64_t head) const {
    Bf16 *keys = Cache(keys_, sequence, head), *values = Cache(values_, sequence, head);
    std::vector<float> wide(static_cast<size_t>(d_));
    for (int64_t t = 0; t < sequence.length; ++t) {
      Widen(Rotated(sequence.begin + t, n_ + head), wide.data());
      kernels::WritePairKey(wide.data(), keys, t, d_);
      Widen(Value(sequence.begin + t, head), wide.data());
      kernels::WritePairValue(wide.data(), values, t, d_);
    }
    if (sequence.length % 2 == 0) return;
    std::fill(wide.begin(), wide.end(), 0.0f);  // takes part with a weight of zero
    kernels::WritePairValue(wide.data(), values, sequence.length, d_);
  }

  void Attend(const Sequence& sequence, int64_t head, int64_t first_token, float* scratch) const {
    const int64_t group = n_ / m_, last_token = std::min(first_token + kTurnTokens, sequence.length);
    kernels::PairAttentionItem item{.keys = Cache(keys_, sequence, head), .values = Cache(values_, sequence, head),
                                    .scratch = scratch, .head_dim = d_, .scale = 1.0f / std::sqrt(static_cast<float>(d_))};
    float* queries = scratch + kernels::PairScratchFloats(longest_, d_);
    auto* out = static_cast<Bf16*>(out_.data_ptr());
    for (int64_t i = first_token * group; i < last_token * group; i += kernels::kPairQueries) {
      item.count = static_cast<int>(std::min<int64_t>(kernels::kPairQueries, last_token * group - i));
      for (int q = 0; q < item.count; ++q) {
        const int64_t t = (i + q) / group, token = sequence.begin + t, query_head = head * group + (i + q) % group;
        float* query = queries + q * d_;
        Widen(Rotated(token, query_head), query);
        item.queries[q] = {.query = query, .out = out + (token * n_ + query_head) * d_,
                           .first = window_ > 0 ? std::max<int64_t>(0, t - window_ + 1) : 0, .last = t};
      }
      kernels::AttendPairs(item);
    }
  }

  const Bf16 *qkv_, *rotated_;
  const int64_t n_, m_, d_, window_;
  std::vector<Sequence> sequences_;
  int64_t places_ = 0, longest_ = 0;
  at::Tensor keys_, values_, out_;
};

}  // namespace

bool TakesCausalAttention(const at::Tensor& qkv, const AttentionShape& shape) {
  return qkv.is_cpu() && qkv.scalar_type() == at::kBFloat16 && kernels::PairAttentionWorks(shape.head_dim) &&
         !(at::GradMode::is_enabled() && qkv.requires_grad());
}

at::Tensor CausalAttention(const at::Tensor& qkv, const at::Tensor& cos, const at::Tensor& sin, const std::vector<int64_t>& lengths,
                           const AttentionShape& shape) {
  const at::Tensor rows = qkv.contiguous();
  const at::Tensor rotated = Rotated(rows.narrow(1, 0, (shape.heads + shape.kv_heads) * shape.head_dim), cos, sin, shape.head_dim);
  return Pass(rows, rotated, lengths, shape).Run();
}

}  // namespace refinery::model
