#include "worker/task/runtime/torch.h"
// The precompiled header comes first.
#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>

#include "worker/task/eval/pair_tree_pass.h"
#include "worker/task/generate/cpu_kernels.h"
#include "worker/task/model/kernels.h"
#include "worker/task/model/pair_simd.h"

namespace refinery::eval {
namespace {

using generate::Share;
using generate::ShareOf;
using kernels::PairMatmul;
using simd::Bf16;

constexpr int64_t kBlock = kernels::kKeyBlock;
constexpr float kNegligible = -40;  // e^-40 of 64 outputs against 1: below a float's last bit for any vocabulary
constexpr int64_t kPhases = 5;  // of a layer, whose work is taken in turns

template <typename T = Bf16>
T* Data(const at::Tensor& tensor) {
  return tensor.defined() ? static_cast<T*>(tensor.data_ptr()) : nullptr;
}

}  // namespace

bool PairTreePass::Works(const model::CausalLm& model) {
  if (!model.device().is_cpu() || model.dtype() != at::kBFloat16 || !kernels::PairAttentionWorks(model.config().head_dim)) return false;
  if (model.config().hidden_size % 2 != 0 || model.config().intermediate_size % 2 != 0) return false;
  for (const model::DecoderLayer& layer : model.layers) {
    for (const model::Linear* linear : {&layer.q, &layer.k, &layer.v, &layer.o, &layer.gate, &layer.up, &layer.down}) {
      if (linear->packed != nullptr || linear->lora_a.defined() || !linear->weight.is_contiguous()) return false;
      const bool with_bias = linear == &layer.gate || linear == &layer.up;  // SiLU's product takes none
      if (with_bias && linear->bias.defined()) return false;
    }
  }
  return model.lm_head.is_contiguous();
}

PairTreePass::PairTreePass(std::shared_ptr<const model::CausalLm> model)
    : model_(std::move(model)), config_(model_->config()), n_(config_.num_heads), m_(config_.num_kv_heads), d_(config_.head_dim),
      team_(at::get_num_threads()), panel_numbers_(static_cast<size_t>(team_.size())), panels_(panel_numbers_.size()), scores_(static_cast<size_t>(team_.size())),
      turns_((model_->layers.size() * kPhases + 1) * static_cast<size_t>(team_.size())), phase_(static_cast<size_t>(team_.size())) {
  const int64_t widest = std::max({config_.hidden_size, config_.intermediate_size, n_ * d_});
  for (size_t i = 0; i < panels_.size(); ++i) {
    panel_numbers_[i].resize(static_cast<size_t>(kernels::PairPanelNumbers(widest)));
    panels_[i].numbers = panel_numbers_[i].data();
  }
}

PairTreePass::View PairTreePass::MakeView(const TreeBatch& batch, int64_t window) const {
  View view;
  const int64_t group = n_ / m_, rows = nodes_ * group;
  std::vector<int64_t> parents(static_cast<size_t>(nodes_));  // in the batch
  for (const TreeBlock& block : batch.blocks) {
    for (size_t i = 0; i < block.parents.size(); ++i) {
      parents[static_cast<size_t>(block.begin) + i] = block.parents[i] < 0 ? -1 : block.begin + block.parents[i];
    }
  }
  std::vector<uint16_t> seen;                     // [tokens of the tile, blocks of the batch]
  const int64_t all = (nodes_ + kBlock - 1) / kBlock;
  for (int64_t first = 0; first < rows;) {
    Tile tile{.first = first, .count = std::min<int64_t>(kernels::kPairQueries, rows - first), .token = first / group};
    tile.tokens = (first + tile.count - 1) / group + 1 - tile.token;
    first += tile.count;
    seen.assign(static_cast<size_t>(tile.tokens * all), 0);
    int64_t lowest = all;
    for (int64_t t = 0; t < tile.tokens; ++t) {
      const int64_t node = tile.token + t, depth = batch.positions[static_cast<size_t>(node)];
      for (int64_t at = node; at >= 0; at = parents[static_cast<size_t>(at)]) {
        if (window > 0 && depth - batch.positions[static_cast<size_t>(at)] >= window) break;
        seen[static_cast<size_t>(t * all + at / kBlock)] |= static_cast<uint16_t>(1u << (at % kBlock));
        lowest = std::min(lowest, at / kBlock);
      }
    }
    tile.blocks = view.blocks.size();
    tile.seen = view.seen.size();
    for (int64_t b = lowest; b <= (tile.token + tile.tokens - 1) / kBlock; ++b) {
      uint16_t any = 0;
      for (int64_t t = 0; t < tile.tokens; ++t) any |= seen[static_cast<size_t>(t * all + b)];
      if (any != 0) view.blocks.push_back(static_cast<int32_t>(b));
    }
    tile.block_count = view.blocks.size() - tile.blocks;
    for (int64_t t = 0; t < tile.tokens; ++t) {
      for (size_t i = 0; i < tile.block_count; ++i) {
        view.seen.push_back(seen[static_cast<size_t>(t * all + view.blocks[tile.blocks + i])]);
      }
    }
    view.most_blocks = std::max(view.most_blocks, tile.block_count);
    view.tiles.push_back(tile);
  }
  return view;
}

void PairTreePass::Lay(const TreeBatch& batch, const std::vector<int64_t>& nodes) {
  nodes_ = static_cast<int64_t>(batch.token_ids.size());
  const auto size = [&](int64_t columns) { return static_cast<size_t>(nodes_ * columns); };
  const int64_t h = config_.hidden_size;
  for (const int64_t id : batch.token_ids) TORCH_CHECK(id >= 0 && id < model_->embed_tokens.size(0), "token ", id, " is unknown");
  TORCH_CHECK(std::is_sorted(nodes.begin(), nodes.end(), std::less_equal<>()) || nodes.size() < 2, "wanted nodes must ascend");
  TORCH_CHECK(!nodes.empty() && nodes.front() >= 0 && nodes.back() < nodes_, "a wanted node is not in the batch");
  hidden_.resize(size(h));
  normed_.resize(size(std::max(h, n_ * d_)));
  qkv_.resize(size((n_ + 2 * m_) * d_));
  context_.resize(size(n_ * d_));
  gated_.resize(size(config_.intermediate_size));
  const int64_t capacity = (nodes_ + kBlock - 1) / kBlock * kBlock;
  for (auto* cache : {&keys_, &values_}) {
    cache->assign(static_cast<size_t>(capacity * m_ * d_), Bf16{0});  // what lies behind the last node is looked at too
  }
  views_.clear();
  size_t most = 0;
  for (const model::DecoderLayer& layer : model_->layers) {
    if (views_.contains(layer.sliding_window)) continue;
    most = std::max(most, (views_[layer.sliding_window] = MakeView(batch, layer.sliding_window)).most_blocks);
  }
  for (auto& scores : scores_) {
    const int64_t floats = kernels::PairScratchFloats(static_cast<int64_t>(most) * kBlock, d_) + kernels::kPairQueries * d_;
    scores.resize(std::max(scores.size(), static_cast<size_t>(floats)));
  }
  // As of whole sequences, not of tokens decoded one after the other.
  const int64_t depth = *std::max_element(batch.positions.begin(), batch.positions.end()) + 1;
  const model::Rotary rotary = model_->MakeRotary(std::vector<int64_t>{depth});
  const at::Tensor positions = at::tensor(batch.positions, at::kLong);
  cos_ = rotary.cos.index_select(0, positions).contiguous();
  sin_ = rotary.sin.index_select(0, positions).contiguous();
  for (std::atomic<int64_t>& turns : turns_) turns.store(0);
  std::fill(phase_.begin(), phase_.end(), 0);
  for (kernels::PairPanel& panel : panels_) panel.weight = nullptr;
  const Bf16* rows = Data(model_->embed_tokens);
  for (int64_t i = 0; i < nodes_; ++i) std::copy_n(rows + batch.token_ids[static_cast<size_t>(i)] * h, h, hidden_.data() + i * h);
}

void PairTreePass::Normalize(const at::Tensor& weight, int64_t rows, int member) {
  const Share share = ShareOf(rows, member, team_.size());
  const int64_t h = config_.hidden_size;
  kernels::RmsNorm<Bf16>(hidden_.data() + share.begin * h, Data(weight), normed_.data() + share.begin * h, nullptr,
                         share.end - share.begin, h, static_cast<float>(config_.rms_norm_eps));
  team_.Barrier();
}

template <typename Body>
void PairTreePass::TakeTurns(int64_t turns, int member, const Body& body) {
  const int members = team_.size();
  std::atomic<int64_t>* taken = turns_.data() + phase_[static_cast<size_t>(member)]++ * static_cast<size_t>(members);
  for (int i = 0; i < members; ++i) {
    const int whose = (member + i) % members;
    const Share share = ShareOf(turns, whose, members);
    for (int64_t turn = share.begin + taken[whose].fetch_add(1); turn < share.end; turn = share.begin + taken[whose].fetch_add(1)) {
      body(turn);
    }
  }
  team_.Barrier();
}

void PairTreePass::Multiply(const std::vector<PairMatmul>& products, int member) {
  std::vector<int64_t> ends;
  for (const PairMatmul& product : products) ends.push_back((ends.empty() ? 0 : ends.back()) + kernels::PairMatmulUnits(product));
  kernels::PairPanel& panel = panels_[static_cast<size_t>(member)];
  TakeTurns(ends.back(), member, [&](int64_t turn) {
    const size_t i = static_cast<size_t>(std::upper_bound(ends.begin(), ends.end(), turn) - ends.begin());
    kernels::PairMatmulUnit(products[i], turn - (i == 0 ? 0 : ends[i - 1]), panel);
  });
}

// Keys, with the heads' norm (Qwen3) and the rotary embedding, and values to where attention reads them.
void PairTreePass::PrepareHeads(const model::DecoderLayer& layer, int member) {
  const Share share = ShareOf(nodes_, member, team_.size(), kBlock);  // a value's pair belongs to one member
  const int64_t capacity = (nodes_ + kBlock - 1) / kBlock * kBlock, row = (n_ + 2 * m_) * d_;
  std::vector<float> wide(static_cast<size_t>(2 * m_ * d_));
  for (int64_t t = share.begin; t < share.end; ++t) {
    kernels::Widen<Bf16>(qkv_.data() + t * row + n_ * d_, wide.data(), 2 * m_ * d_);
    for (int64_t head = 0; head < m_; ++head) {
      float* key = wide.data() + head * d_;
      kernels::NormAndRotateHead<Bf16>(key, Data(layer.k_norm), Data<float>(cos_) + t * d_, Data<float>(sin_) + t * d_, d_,
                                       static_cast<float>(config_.rms_norm_eps));
      kernels::WritePairKey(key, keys_.data() + head * capacity * d_, t, d_);
      kernels::WritePairValue(wide.data() + (m_ + head) * d_, values_.data() + head * capacity * d_, t, d_);
    }
  }
  team_.Barrier();
}

void PairTreePass::Attend(size_t index, int member) {
  const model::DecoderLayer& layer = model_->layers[index];
  const View& view = views_.at(layer.sliding_window);
  const int64_t capacity = (nodes_ + kBlock - 1) / kBlock * kBlock, group = n_ / m_, row = (n_ + 2 * m_) * d_;
  float* queries = scores_[static_cast<size_t>(member)].data();
  kernels::PairAttentionItem item{.scratch = queries + kernels::kPairQueries * d_,
                                  .head_dim = d_,
                                  .scale = 1.0f / std::sqrt(static_cast<float>(d_))};
  constexpr int64_t kTurn = 16;  // tiles
  const int64_t tiles = static_cast<int64_t>(view.tiles.size()), pieces = (tiles + kTurn - 1) / kTurn;
  TakeTurns(pieces * m_, member, [&](int64_t turn) {
    const int64_t head = turn / pieces, begin = turn % pieces * kTurn;
    item.keys = keys_.data() + head * capacity * d_;
    item.values = values_.data() + head * capacity * d_;
    for (int64_t i = begin; i < std::min(begin + kTurn, tiles); ++i) {
      const Tile& tile = view.tiles[static_cast<size_t>(i)];
      if (i + 1 < tiles) {  // the next tile's queries, which lie far apart
        const Tile& next = view.tiles[static_cast<size_t>(i + 1)];
        for (int64_t t = next.token; t < next.token + next.tokens; ++t) {
          const Bf16* queries_of = qkv_.data() + t * row + head * group * d_;
          for (int64_t c = 0; c < group * d_; c += 32) __builtin_prefetch(queries_of + c);
        }
      }
      item.count = static_cast<int>(tile.count);
      item.blocks = view.blocks.data() + tile.blocks;
      item.block_count = static_cast<int64_t>(tile.block_count);
      for (int64_t q = 0; q < tile.count; ++q) {
        const int64_t t = (tile.first + q) / group, query_head = head * group + (tile.first + q) % group;
        float* query = queries + q * d_;
        kernels::Widen<Bf16>(qkv_.data() + t * row + query_head * d_, query, d_);
        kernels::NormAndRotateHead<Bf16>(query, Data(layer.q_norm), Data<float>(cos_) + t * d_, Data<float>(sin_) + t * d_, d_,
                                         static_cast<float>(config_.rms_norm_eps));
        item.queries[q] = {.query = query, .out = context_.data() + (t * n_ + query_head) * d_, .first = 0, .last = 0,
                           .seen = view.seen.data() + tile.seen + static_cast<size_t>(t - tile.token) * tile.block_count};
      }
      kernels::AttendPairs(item);
    }
  });
}

void PairTreePass::Layer(size_t index, int member, const std::vector<int64_t>& nodes) {
  const model::DecoderLayer& layer = model_->layers[index];
  const int64_t h = config_.hidden_size, wide = config_.intermediate_size, qkv = (n_ + 2 * m_) * d_;
  const bool last = index + 1 == model_->layers.size();
  int64_t rows = nodes_;
  Normalize(layer.input_norm, rows, member);
  const auto projection = [&](const model::Linear& linear, int64_t column) {
    return PairMatmul{.x = normed_.data(), .rows = rows, .inputs = h, .x_stride = h, .weight = Data(linear.weight),
                      .outputs = linear.outputs(), .bias = Data(linear.bias), .y = qkv_.data() + column, .y_stride = qkv};
  };
  Multiply({projection(layer.q, 0), projection(layer.k, n_ * d_), projection(layer.v, (n_ + m_) * d_)}, member);
  PrepareHeads(layer, member);
  Attend(index, member);
  if (last) {  // the other nodes only lent their keys and values
    rows = static_cast<int64_t>(nodes.size());
    if (member == 0) {
      for (int64_t i = 0; i < rows; ++i) {  // nodes ascend: no row is written over before it is read
        const int64_t node = nodes[static_cast<size_t>(i)];
        std::copy_n(context_.data() + node * n_ * d_, n_ * d_, context_.data() + i * n_ * d_);
        std::copy_n(hidden_.data() + node * h, h, hidden_.data() + i * h);
      }
    }
    team_.Barrier();
  }
  Multiply({{.x = context_.data(), .rows = rows, .inputs = n_ * d_, .x_stride = n_ * d_, .weight = Data(layer.o.weight), .outputs = h,
             .bias = Data(layer.o.bias), .residual = hidden_.data(), .y = hidden_.data(), .y_stride = h}}, member);
  Normalize(layer.post_attention_norm, rows, member);
  Multiply({{.x = normed_.data(), .rows = rows, .inputs = h, .x_stride = h, .weight = Data(layer.gate.weight), .outputs = wide,
             .up = Data(layer.up.weight), .y = gated_.data(), .y_stride = wide}}, member);
  Multiply({{.x = gated_.data(), .rows = rows, .inputs = wide, .x_stride = wide, .weight = Data(layer.down.weight), .outputs = h,
             .bias = Data(layer.down.bias), .residual = hidden_.data(), .y = hidden_.data(), .y_stride = h}}, member);
  if (last) Normalize(model_->final_norm, rows, member);
}

std::vector<TokenChoice> PairTreePass::Head(int64_t rows, const std::vector<TargetToken>& targets) {
  const int64_t outputs = model_->lm_head.size(0), panels = (outputs + kernels::kPanelOutputs - 1) / kernels::kPanelOutputs;
  std::vector<size_t> order(targets.size());  // by panel, then by row
  std::iota(order.begin(), order.end(), size_t{0});
  const auto panel_of = [&](size_t i) { return targets[i].token / kernels::kPanelOutputs; };
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return panel_of(a) < panel_of(b); });
  std::vector<kernels::PairHead::Wanted> wanted;
  std::vector<int64_t> starts(static_cast<size_t>(panels) + 1);
  for (const size_t i : order) {
    TORCH_CHECK(targets[i].token >= 0 && targets[i].token < outputs && targets[i].row < rows, "target outside the model");
    wanted.push_back({.row = static_cast<int32_t>(targets[i].row), .output = static_cast<int32_t>(targets[i].token)});
    ++starts[static_cast<size_t>(panel_of(i)) + 1];
  }
  std::partial_sum(starts.begin(), starts.end(), starts.begin());
  tops_.resize(std::max(tops_.size(), static_cast<size_t>(panels * rows)));
  const kernels::PairHead head{.x = normed_.data(), .rows = rows, .inputs = config_.hidden_size, .weight = Data(model_->lm_head),
                               .outputs = outputs, .tops = tops_.data(), .wanted = wanted.data(), .starts = starts.data()};
  std::vector<kernels::PanelTop> best(static_cast<size_t>(rows));
  std::vector<double> log_sums(static_cast<size_t>(rows));
  team_.Run([&](int member) {
    TakeTurns(panels, member, [&](int64_t panel) { kernels::PairHeadPanel(head, panel, panels_[static_cast<size_t>(member)]); });
    const Share share = ShareOf(rows, member, team_.size());
    for (int64_t row = share.begin; row < share.end; ++row) {
      const kernels::PanelTop* tops = tops_.data() + row * panels;
      kernels::PanelTop top = tops[0];
      for (int64_t p = 1; p < panels; ++p) {
        if (tops[p].highest > top.highest) top = tops[p];  // the first panel of equal ones
      }
      double sum = 0;
      for (int64_t p = 0; p < panels; ++p) {
        const float below = tops[p].highest - top.highest;
        if (!(below < kNegligible)) sum += static_cast<double>(tops[p].sum * std::exp(below));
      }
      best[static_cast<size_t>(row)] = top;
      log_sums[static_cast<size_t>(row)] = top.highest + std::log(sum);
    }
  });
  std::vector<TokenChoice> choices(targets.size());
  for (size_t i = 0; i < order.size(); ++i) {
    const auto row = static_cast<size_t>(wanted[i].row);
    choices[order[i]] = {static_cast<float>(wanted[i].logit - log_sums[row]), best[row].first == wanted[i].output};
  }
  return choices;
}

std::vector<TokenChoice> PairTreePass::Score(const TreeBatch& batch, const std::vector<int64_t>& nodes,
                                             const std::vector<TargetToken>& targets) {
  const at::NoGradGuard no_grad;
  Lay(batch, nodes);
  team_.Run([&](int member) {
    for (size_t i = 0; i < model_->layers.size(); ++i) Layer(i, member, nodes);
  });
  return Head(static_cast<int64_t>(nodes.size()), targets);
}

}  // namespace refinery::eval
