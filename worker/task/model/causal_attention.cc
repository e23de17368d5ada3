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
constexpr int64_t kMostWeights = int64_t{1} << 25;  // kept for a gradient, two numbers of 16 bits each

int64_t Padded(int64_t length) { return (length + kBlock - 1) / kBlock * kBlock; }

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
      places_ += Padded(length);
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

// Calls body(i, scratch) for all i below count; threads take what comes next.
template <typename Body>
void TakeTurns(size_t count, int64_t scratch_floats, const Body& body) {
  std::atomic<size_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    const at::Tensor scratch = at::empty({scratch_floats}, at::kFloat);
    for (size_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) body(i, scratch.data_ptr<float>());
  });
}

// The gradients of one call, those of queries and keys before the rotary embedding is turned back.
class GradientPass {
 public:
  // All but the lengths [T, ..] bfloat16, contiguous; `rotated` as in Pass. They must outlive the pass.
  GradientPass(const at::Tensor& dout, const at::Tensor& out, const at::Tensor& qkv, const at::Tensor& rotated,
               const std::vector<int64_t>& lengths, const AttentionShape& shape)
      : dout_(Data(dout)), out_(Data(out)), qkv_(Data(qkv)), rotated_(Data(rotated)), n_(shape.heads), m_(shape.kv_heads), d_(shape.head_dim),
        window_(shape.sliding_window) {
    int64_t begin = 0, squares = 0;
    for (const int64_t length : lengths) {
      const int64_t capacity = Padded(length);
      const Sequence sequence{.begin = begin, .length = length, .capacity = capacity, .place = places_, .square = squares};
      if (length > 0) sequences_.push_back(sequence);
      begin += length;
      places_ += capacity;
      squares += n_ * capacity * capacity;
      longest_ = std::max(longest_, length);
    }
    for (at::Tensor* cache : {&keys_, &keys_by_pairs_, &values_}) *cache = at::empty({m_ * places_ * d_}, qkv.options());
    for (at::Tensor* cache : {&queries_, &gradients_}) *cache = at::empty({n_ * places_ * d_}, qkv.options());
    for (at::Tensor* square : {&weights_, &changes_}) *square = at::empty({squares}, qkv.options());
    result_ = at::empty_like(qkv);
  }

  at::Tensor Run() {
    std::vector<Turn> heads, queries, keys;
    for (const Sequence& sequence : sequences_) {
      for (int64_t head = 0; head < n_; ++head) heads.push_back({&sequence, head, 0});
      for (int64_t at = 0; at < sequence.length; at += kTurnTokens) {
        for (int64_t head = 0; head < n_; ++head) queries.push_back({&sequence, head, at});
        for (int64_t head = 0; head < m_; ++head) keys.push_back({&sequence, head, at});
      }
    }
    TakeTurns(heads.size(), d_, [&](size_t i, float* scratch) { Lay(heads[i], scratch); });
    TakeTurns(queries.size(), kernels::PairGradientScratchFloats(longest_, d_),
              [&](size_t i, float* scratch) { OfQueries(queries[i], scratch); });
    TakeTurns(keys.size(), 1, [&](size_t i, float*) { OfKeys(keys[i]); });
    return result_;
  }

 private:
  struct Sequence {
    int64_t begin = 0, length = 0;  // tokens
    int64_t capacity = 0;           // the length, padded
    int64_t place = 0, square = 0;  // where its caches and its weights begin
  };
  struct Turn {
    const Sequence* sequence;
    int64_t head, at;
  };

  static Bf16* Data(const at::Tensor& tensor) { return static_cast<Bf16*>(tensor.data_ptr()); }
  Bf16* Cache(const at::Tensor& cache, const Sequence& sequence, int64_t head) const {
    return Data(cache) + (head * places_ + sequence.place) * d_;
  }
  Bf16* Square(const at::Tensor& square, const Sequence& sequence, int64_t head) const {
    return Data(square) + sequence.square + head * sequence.capacity * sequence.capacity;
  }
  // Head h of a token's row: of rotated_ n queries, m keys; of qkv_ and result_ m values besides.
  const Bf16* Rotated(int64_t token, int64_t h) const { return rotated_ + (token * (n_ + m_) + h) * d_; }
  int64_t Column(int64_t token, int64_t h) const { return (token * (n_ + 2 * m_) + h) * d_; }
  void Widen(const Bf16* row, float* to) const {
    for (int64_t j = 0; j < d_; ++j) to[j] = std::bit_cast<float>(static_cast<uint32_t>(row[j].bits) << 16);
  }

  // Lays out what the products read: queries and gradients of one head; keys and values, padded by zeros, by the heads below m.
  void Lay(const Turn& turn, float* wide) const {
    const Sequence& s = *turn.sequence;
    Bf16 *queries = Cache(queries_, s, turn.head), *gradients = Cache(gradients_, s, turn.head);
    for (int64_t t = 0; t < s.length; ++t) {
      Widen(Rotated(s.begin + t, turn.head), wide);
      kernels::WritePairValue(wide, queries, t, d_);
      Widen(dout_ + ((s.begin + t) * n_ + turn.head) * d_, wide);
      kernels::WritePairValue(wide, gradients, t, d_);
    }
    if (turn.head >= m_) return;
    Bf16 *keys = Cache(keys_, s, turn.head), *by_pairs = Cache(keys_by_pairs_, s, turn.head), *values = Cache(values_, s, turn.head);
    for (int64_t t = 0; t < s.capacity; ++t) {
      const bool token = t < s.length;
      if (token) Widen(Rotated(s.begin + t, n_ + turn.head), wide); else std::fill_n(wide, d_, 0.0f);
      kernels::WritePairKey(wide, keys, t, d_);
      kernels::WritePairValue(wide, by_pairs, t, d_);
      if (token) Widen(qkv_ + Column(s.begin + t, n_ + m_ + turn.head), wide);
      kernels::WritePairKey(wide, values, t, d_);
    }
  }

  void OfQueries(const Turn& turn, float* scratch) const {
    const Sequence& s = *turn.sequence;
    const int64_t kv_head = turn.head / (n_ / m_), end = std::min(turn.at + kTurnTokens, s.length);
    kernels::PairGradientItem item{.keys = Cache(keys_, s, kv_head), .values = Cache(values_, s, kv_head),
                                   .keys_by_pairs = Cache(keys_by_pairs_, s, kv_head), .capacity = s.capacity, .scratch = scratch,
                                   .head_dim = d_, .scale = 1.0f / std::sqrt(static_cast<float>(d_))};
    for (int64_t first = turn.at; first < end; first += kernels::kPairQueries) {
      item.count = static_cast<int>(std::min<int64_t>(kernels::kPairQueries, end - first));
      for (int q = 0; q < item.count; ++q) {
        const int64_t t = first + q, token = s.begin + t, row = (token * n_ + turn.head) * d_;
        item.queries[q] = {.query = Rotated(token, turn.head), .out = out_ + row, .gradient = dout_ + row,
                           .to = Data(result_) + Column(token, turn.head),
                           .first = window_ > 0 ? std::max<int64_t>(0, t - window_ + 1) : 0, .last = t};
      }
      item.weights = Square(weights_, s, turn.head) + first * s.capacity;
      item.changes = Square(changes_, s, turn.head) + first * s.capacity;
      kernels::PairQueryGradient(item);
    }
  }

  void OfKeys(const Turn& turn) const {
    const Sequence& s = *turn.sequence;
    const int64_t group = n_ / m_, head = turn.head * group, end = std::min(turn.at + kTurnTokens, s.length);
    for (int64_t key = turn.at; key < end; key += 4) {
      kernels::PairKeySum sum{.rows_stride = places_ * d_, .heads = group, .capacity = s.capacity, .head_dim = d_, .first = key / 2,
                              .last = (s.length + 1) / 2, .key = key};
      if (window_ > 0) sum.last = std::min(sum.last, (key + 3 + window_ - 1) / 2 + 1);
      for (const bool of_keys : {true, false}) {
        sum.numbers = Square(of_keys ? changes_ : weights_, s, head);
        sum.rows = Cache(of_keys ? queries_ : gradients_, s, head);
        for (int64_t i = 0; i < 4; ++i) {
          const int64_t column = Column(s.begin + key + i, n_ + (of_keys ? 0 : m_) + turn.head);
          sum.to[i] = key + i < s.length ? Data(result_) + column : nullptr;
        }
        kernels::SumOverQueries(sum);
      }
    }
  }

  const Bf16 *dout_, *out_, *qkv_, *rotated_;
  const int64_t n_, m_, d_, window_;
  std::vector<Sequence> sequences_;
  int64_t places_ = 0, longest_ = 0;
  at::Tensor keys_, keys_by_pairs_, values_;  // [m, places, d] in the layouts of pair_attention.h
  at::Tensor queries_, gradients_;            // [n, places, d], laid out as values
  at::Tensor weights_, changes_;              // by sequence [n, capacity / 2, capacity, 2]
  at::Tensor result_;
};

}  // namespace

bool TakesCausalAttention(const at::Tensor& qkv, const std::vector<int64_t>& lengths, const AttentionShape& shape) {
  if (!qkv.is_cpu() || qkv.scalar_type() != at::kBFloat16 || !kernels::PairAttentionWorks(shape.head_dim)) return false;
  if (!at::GradMode::is_enabled() || !qkv.requires_grad()) return true;
  int64_t weights = 0;
  for (const int64_t length : lengths) weights += shape.heads * Padded(length) * Padded(length);
  return weights <= kMostWeights;
}

at::Tensor CausalAttentionGradient(const at::Tensor& dout, const at::Tensor& out, const at::Tensor& qkv, const at::Tensor& cos,
                                   const at::Tensor& sin, const std::vector<int64_t>& lengths, const AttentionShape& shape) {
  const at::Tensor rotated = Rotated(qkv.narrow(1, 0, (shape.heads + shape.kv_heads) * shape.head_dim), cos, sin, shape.head_dim);
  return GradientPass(dout, out, qkv, rotated, lengths, shape).Run();
}

at::Tensor CausalAttention(const at::Tensor& qkv, const at::Tensor& cos, const at::Tensor& sin, const std::vector<int64_t>& lengths,
                           const AttentionShape& shape) {
  const at::Tensor rows = qkv.contiguous();
  const at::Tensor rotated = Rotated(rows.narrow(1, 0, (shape.heads + shape.kv_heads) * shape.head_dim), cos, sin, shape.head_dim);
  return Pass(rows, rotated, lengths, shape).Run();
}

}  // namespace refinery::model
